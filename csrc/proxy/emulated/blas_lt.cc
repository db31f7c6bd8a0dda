// cuBLASLt: descriptions of products, and the products.
#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <vector>

#include "proxy/emulated/blas.h"
#include "proxy/emulated/epilogue.h"

MNEMOSYNE_EXPORT int cublasCreate_v2(void**);
MNEMOSYNE_EXPORT int cublasDestroy_v2(void*);

namespace mnemosyne::proxy::emulated {
namespace {

// A descriptor of any kind: its attributes by their numbers. Callers keep them
// alive while they use them, as NVIDIA's are plain memory too.
class Descriptor {
 public:
  template <typename T>
  T get(int attribute, T otherwise) const {
    const auto found = attributes_.find(attribute);
    if (found == attributes_.end()) return otherwise;
    T value = otherwise;
    std::memcpy(&value, found->second.data(),
                std::min(sizeof value, found->second.size()));
    return value;
  }
  template <typename T>
  void put(int attribute, const T& value) {
    putBytes(attribute, &value, sizeof value);
  }
  void putBytes(int attribute, const void* from, size_t size_bytes) {
    const auto* const bytes = static_cast<const std::byte*>(from);
    attributes_[attribute].assign(bytes, bytes + size_bytes);
  }
  int getBytes(int attribute, void* to, size_t size_bytes,
               size_t* written) const {
    const auto found = attributes_.find(attribute);
    if (found == attributes_.end()) return kCublasInvalidValue;
    const size_t stored = found->second.size();
    if (written != nullptr) *written = stored;
    if (size_bytes == 0) return kCublasSuccess;
    if (size_bytes < stored) return kCublasInvalidValue;
    std::memcpy(to, found->second.data(), stored);
    return kCublasSuccess;
  }
  bool has(int attribute) const { return attributes_.contains(attribute); }

 private:
  std::map<int, std::vector<std::byte>> attributes_;
};

enum LayoutAttribute : int {
  kLayoutType = 0,
  kOrder = 1,
  kRows = 2,
  kColumns = 3,
  kLd = 4,
  kBatchCount = 5,
  kBatchStride = 6,
};

enum MatmulAttribute : int {
  kComputeType = 0,
  kScaleType = 1,
  kPointerMode = 2,
  kTransposeA = 3,
  kTransposeB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kBiasBatchStride = 10,
  kAuxPointer = 11,
  kAuxLd = 12,
  kAuxBatchStride = 13,
  kScaleOfA = 17,
  kScaleOfB = 18,
  kScaleOfC = 19,
  kScaleOfD = 20,
  kMaximumOfD = 21,
  kAuxType = 22,
  kBiasType = 26,
};

constexpr int kMaxWorkspaceBytes = 1;  // of a preference

const Descriptor& read(const void* descriptor) {
  return *static_cast<const Descriptor*>(descriptor);
}

int make(void** to, const Descriptor& descriptor) {
  if (to == nullptr) return kCublasInvalidValue;
  *to = new Descriptor(descriptor);
  return kCublasSuccess;
}

int destroy(void* descriptor) {
  delete static_cast<Descriptor*>(descriptor);
  return kCublasSuccess;
}

int set(void* descriptor, int attribute, const void* from, size_t size_bytes) {
  if (descriptor == nullptr || from == nullptr || size_bytes == 0) {
    return kCublasInvalidValue;
  }
  static_cast<Descriptor*>(descriptor)->putBytes(attribute, from, size_bytes);
  return kCublasSuccess;
}

Matrix matrixOf(const void* address, const Descriptor& layout) {
  return {reinterpret_cast<uint64_t>(address),
          layout.get<int>(kLayoutType, kFloat32), layout.get<int64_t>(kLd, 0),
          layout.get<int64_t>(kBatchStride, 0)};
}

// One call of cublasLtMatmul.
struct Matmul {
  Product product;
  Matrix c, d;
  Scalar alpha, beta;
  Epilogue epilogue;
  int scalar_type = kFloat32;
};

struct Layouts {
  const Descriptor& a;
  const Descriptor& b;
  const Descriptor& c;
  const Descriptor& d;
};

// Fills in what the descriptors say; returns a CublasStatus.
int describe(const Descriptor& desc, const Layouts& layouts, Matmul* matmul) {
  for (const int scale :
       {kScaleOfA, kScaleOfB, kScaleOfC, kScaleOfD, kMaximumOfD}) {
    if (desc.get<const void*>(scale, nullptr)) return kCublasNotSupported;
  }
  matmul->scalar_type = scalarType(desc.get<int>(kComputeType, kCompute32F));
  if (matmul->scalar_type < 0) return kCublasNotSupported;
  for (const Descriptor* layout :
       {&layouts.a, &layouts.b, &layouts.c, &layouts.d}) {
    constexpr int kByColumns = 0;
    if (layout->get<int>(kOrder, kByColumns) != kByColumns ||
        numberSize(layout->get<int>(kLayoutType, -1)) == 0) {
      return kCublasNotSupported;
    }
  }
  Product& product = matmul->product;
  product.transpose_a = desc.get<int>(kTransposeA, 0) != 0;
  product.transpose_b = desc.get<int>(kTransposeB, 0) != 0;
  const auto size = [](const Descriptor& layout, bool columns) {
    return layout.get<int64_t>(columns ? kColumns : kRows, 0);
  };
  product.m = size(layouts.d, false);
  product.n = size(layouts.d, true);
  product.k = size(layouts.a, !product.transpose_a);
  product.num_batches = layouts.d.get<int>(kBatchCount, 1);
  if (size(layouts.a, product.transpose_a) != product.m ||
      size(layouts.b, product.transpose_b) != product.k ||
      size(layouts.b, !product.transpose_b) != product.n ||
      layouts.a.get<int>(kBatchCount, 1) != product.num_batches ||
      layouts.b.get<int>(kBatchCount, 1) != product.num_batches) {
    return kCublasInvalidValue;
  }
  const int type = layouts.d.get<int>(kLayoutType, kFloat32);
  Epilogue& epilogue = matmul->epilogue;
  epilogue.kind = desc.get<uint32_t>(kEpilogue, Epilogue::kDefault);
  epilogue.bias = {desc.get<uint64_t>(kBiasPointer, 0),
                   desc.get<int>(kBiasType, type), 0,
                   desc.get<int64_t>(kBiasBatchStride, 0)};
  epilogue.aux = {desc.get<uint64_t>(kAuxPointer, 0),
                  desc.get<int>(kAuxType, type), desc.get<int64_t>(kAuxLd, 0),
                  desc.get<int64_t>(kAuxBatchStride, 0)};
  return epilogue.check();
}

template <typename Sum>
int run(const Matmul& matmul) {
  const Product& product = matmul.product;
  const auto [m, n, k, num_batches] =
      std::tuple(product.m, product.n, product.k, product.num_batches);
  const auto alpha = static_cast<Sum>(matmul.alpha.value());
  const auto beta = static_cast<Sum>(matmul.beta.value());
  const auto reachable = [&, m = m, n = n, k = k, num_batches = num_batches]() {
    const bool ta = product.transpose_a, tb = product.transpose_b;
    return isReachable(product.a, ta ? k : m, ta ? m : k, num_batches) &&
           isReachable(product.b, tb ? n : k, tb ? k : n, num_batches) &&
           isReachable(matmul.d, m, n, num_batches) &&
           (beta == 0 || isReachable(matmul.c, m, n, num_batches)) &&
           matmul.epilogue.isReachable(product);
  };
  if (!reachable()) return kCudaIllegalAddress;
  Epilogue::Sums gradient(matmul.epilogue, product);
  multiply<Sum>(product, [&](int64_t batch, int64_t i, int64_t j, Sum sum) {
    Sum value = alpha * sum;
    if (beta != 0) value += beta * static_cast<Sum>(matmul.c.read(batch, i, j));
    value = static_cast<Sum>(matmul.epilogue.apply(batch, i, j, value));
    gradient.add(batch, i, j, value);
    matmul.d.write(batch, i, j, value);
  });
  gradient.finish();
  return kCudaSuccess;
}

}  // namespace
}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT size_t cublasLtGetVersion() { return 130100; }

// Any cuBLAS handle is one of cuBLASLt too.
MNEMOSYNE_EXPORT int cublasLtCreate(void** handle) {
  return cublasCreate_v2(handle);
}

MNEMOSYNE_EXPORT int cublasLtDestroy(void* handle) {
  return cublasDestroy_v2(handle);
}

MNEMOSYNE_EXPORT int cublasLtMatmulDescCreate(void** descriptor,
                                              int compute_type,
                                              int scale_type) {
  Descriptor made;
  made.put(kComputeType, compute_type);
  made.put(kScaleType, scale_type);
  return make(descriptor, made);
}

MNEMOSYNE_EXPORT int cublasLtMatmulDescDestroy(void* descriptor) {
  return destroy(descriptor);
}

MNEMOSYNE_EXPORT int cublasLtMatmulDescSetAttribute(void* descriptor,
                                                    int attribute,
                                                    const void* from,
                                                    size_t size_bytes) {
  return set(descriptor, attribute, from, size_bytes);
}

MNEMOSYNE_EXPORT int cublasLtMatmulDescGetAttribute(void* descriptor,
                                                    int attribute, void* to,
                                                    size_t size_bytes,
                                                    size_t* written) {
  if (descriptor == nullptr) return kCublasInvalidValue;
  return read(descriptor).getBytes(attribute, to, size_bytes, written);
}

MNEMOSYNE_EXPORT int cublasLtMatrixLayoutCreate(void** layout, int type,
                                                uint64_t rows, uint64_t columns,
                                                int64_t ld) {
  Descriptor made;
  made.put(kLayoutType, type);
  made.put(kRows, rows);
  made.put(kColumns, columns);
  made.put(kLd, ld);
  return make(layout, made);
}

MNEMOSYNE_EXPORT int cublasLtMatrixLayoutDestroy(void* layout) {
  return destroy(layout);
}

MNEMOSYNE_EXPORT int cublasLtMatrixLayoutSetAttribute(void* layout,
                                                      int attribute,
                                                      const void* from,
                                                      size_t size_bytes) {
  return set(layout, attribute, from, size_bytes);
}

MNEMOSYNE_EXPORT int cublasLtMatrixLayoutGetAttribute(void* layout,
                                                      int attribute, void* to,
                                                      size_t size_bytes,
                                                      size_t* written) {
  if (layout == nullptr) return kCublasInvalidValue;
  return read(layout).getBytes(attribute, to, size_bytes, written);
}

MNEMOSYNE_EXPORT int cublasLtMatmulPreferenceCreate(void** preference) {
  Descriptor made;
  made.put(kMaxWorkspaceBytes, uint64_t{0});
  return make(preference, made);
}

MNEMOSYNE_EXPORT int cublasLtMatmulPreferenceDestroy(void* preference) {
  return destroy(preference);
}

MNEMOSYNE_EXPORT int cublasLtMatmulPreferenceSetAttribute(void* preference,
                                                          int attribute,
                                                          const void* from,
                                                          size_t size_bytes) {
  return set(preference, attribute, from, size_bytes);
}

// There is one algorithm, and it needs no workspace.
MNEMOSYNE_EXPORT int cublasLtMatmulAlgoGetHeuristic(
    void* handle, void* descriptor, void* layout_a, void* layout_b,
    void* layout_c, void* layout_d, void* preference, int num_wanted,
    LtHeuristicResult* results, int* num_results) {
  if (blasHandle(handle) == nullptr) return kCublasNotInitialized;
  if (descriptor == nullptr || layout_a == nullptr || layout_b == nullptr ||
      layout_c == nullptr || layout_d == nullptr || preference == nullptr ||
      num_wanted < 1 || results == nullptr || num_results == nullptr) {
    return kCublasInvalidValue;
  }
  *num_results = 0;
  Matmul matmul;
  const int status =
      describe(read(descriptor),
               {read(layout_a), read(layout_b), read(layout_c), read(layout_d)},
               &matmul);
  if (status != kCublasSuccess) return status;
  results[0] = {};
  results[0].algorithm[0] = 1;
  results[0].state = kCublasSuccess;
  results[0].waves = 1;
  *num_results = 1;
  return kCublasSuccess;
}

MNEMOSYNE_EXPORT int cublasLtMatmul(void* handle, void* descriptor,
                                    const void* alpha, const void* a,
                                    void* layout_a, const void* b,
                                    void* layout_b, const void* beta,
                                    const void* c, void* layout_c, void* d,
                                    void* layout_d, const void* /*algorithm*/,
                                    void* /*workspace*/, size_t /*size_bytes*/,
                                    void* stream) {
  if (blasHandle(handle) == nullptr) return kCublasNotInitialized;
  if (descriptor == nullptr || layout_a == nullptr || layout_b == nullptr ||
      layout_c == nullptr || layout_d == nullptr || alpha == nullptr ||
      beta == nullptr) {
    return kCublasInvalidValue;
  }
  const Descriptor& desc = read(descriptor);
  Matmul matmul;
  const int status = describe(
      desc, {read(layout_a), read(layout_b), read(layout_c), read(layout_d)},
      &matmul);
  if (status != kCublasSuccess) return status;
  const int pointer_mode = desc.get<int>(kPointerMode, 0);
  if (pointer_mode > 1) return kCublasNotSupported;  // vectors
  matmul.product.a = matrixOf(a, read(layout_a));
  matmul.product.b = matrixOf(b, read(layout_b));
  matmul.c = matrixOf(c, read(layout_c));
  matmul.d = matrixOf(d, read(layout_d));
  const int scale = desc.get<int>(kScaleType, matmul.scalar_type);
  if (numberSize(scale) == 0) return kCublasNotSupported;
  matmul.alpha = {scale, alpha, pointer_mode == 1};
  matmul.beta = {scale, beta, pointer_mode == 1};
  return submitBlas(stream, [matmul] {
    return matmul.scalar_type == kFloat64 ? run<double>(matmul)
                                          : run<float>(matmul);
  });
}
