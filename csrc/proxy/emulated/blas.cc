// cuBLAS: handles and the products of matrices.
#include "proxy/emulated/blas.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

namespace mnemosyne::proxy::emulated {
namespace {

std::mutex handles_mutex;
std::map<void*, std::unique_ptr<BlasHandle>>& handles() {
  static auto* const all = new std::map<void*, std::unique_ptr<BlasHandle>>;
  return *all;
}

// Sets or gets a field of a handle.
template <typename Body>
int withHandle(void* handle, Body&& body) {
  BlasHandle* const blas = blasHandle(handle);
  if (blas == nullptr) return kCublasNotInitialized;
  body(*blas);
  return kCublasSuccess;
}

struct Gemm {
  Product product;
  Matrix c;
  Scalar alpha;
  Scalar beta;
};

template <typename Sum>
int run(const Gemm& gemm) {
  const Product& product = gemm.product;
  const auto alpha = static_cast<Sum>(gemm.alpha.value());
  const auto beta = static_cast<Sum>(gemm.beta.value());
  const auto reachable = [&](const Matrix& matrix, bool transposed,
                             int64_t rows, int64_t columns) {
    if (transposed) std::swap(rows, columns);
    return isReachable(matrix, rows, columns, product.num_batches);
  };
  Product used = product;
  if (alpha == 0) used.k = 0;  // A and B are not read then
  if (!reachable(gemm.c, false, product.m, product.n) ||
      !reachable(used.a, product.transpose_a, product.m, used.k) ||
      !reachable(used.b, product.transpose_b, used.k, product.n)) {
    return kCudaIllegalAddress;
  }
  withNumberType(gemm.c.type, [&](auto number) {
    using T = decltype(number);
    multiply<Sum>(used, [&](int64_t batch, int64_t i, int64_t j, Sum sum) {
      T& c = gemm.c.column<T>(batch, j)[i];
      Sum value = alpha * sum;
      if (beta != 0) value += beta * static_cast<Sum>(c);
      c = T(value);
    });
  });
  return kCudaSuccess;
}

struct Side {
  int operation;
  uint64_t address;
  int type;
  int64_t ld;
  int64_t stride;

  Matrix matrix() const { return {address, type, ld, stride}; }
  bool isTransposed() const { return operation != 0; }
};

struct Sizes {
  int64_t m, n, k, num_batches;
};

int gemm(void* handle, const Sizes& sizes, const Side& a, const Side& b,
         const Side& c, const void* alpha, const void* beta, int compute_type) {
  BlasHandle* const blas = blasHandle(handle);
  if (blas == nullptr) return kCublasNotInitialized;
  const int type = scalarType(compute_type);
  if (type < 0 || numberSize(a.type) == 0 || numberSize(b.type) == 0 ||
      numberSize(c.type) == 0) {
    return kCublasNotSupported;
  }
  const auto [m, n, k, num_batches] = sizes;
  const auto fits = [](const Side& side, int64_t rows, int64_t columns) {
    return side.operation >= 0 && side.operation <= 2 &&
           side.ld >=
               std::max<int64_t>(1, side.isTransposed() ? columns : rows);
  };
  if (m < 0 || n < 0 || k < 0 || num_batches < 0 || alpha == nullptr ||
      beta == nullptr || !fits(a, m, k) || !fits(b, k, n) || !fits(c, m, n)) {
    return kCublasInvalidValue;
  }
  if (m == 0 || n == 0 || num_batches == 0) return kCublasSuccess;
  const Gemm work = {{m, n, k, num_batches, a.matrix(), b.matrix(),
                      a.isTransposed(), b.isTransposed()},
                     c.matrix(),
                     blas->scalar(type, alpha),
                     blas->scalar(type, beta)};
  return submitBlas(blas->stream, [work, type] {
    return type == kFloat64 ? run<double>(work) : run<float>(work);
  });
}

uint64_t number(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}

}  // namespace

int scalarType(int compute_type) {
  switch (compute_type) {
    case kCompute16F:
    case kCompute16FPedantic:
      return kFloat16;
    case kCompute32F:
    case kCompute32FPedantic:
    case kCompute32FFast16F:
    case kCompute32FFast16BF:
    case kCompute32FFastTF32:
      return kFloat32;
    case kCompute64F:
    case kCompute64FPedantic:
      return kFloat64;
    default:
      return -1;
  }
}

BlasHandle* blasHandle(void* handle) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  const auto found = handles().find(handle);
  return found == handles().end() ? nullptr : found->second.get();
}

bool isReachable(const Matrix& matrix, int64_t rows, int64_t columns,
                 int64_t num_batches) {
  if (rows <= 0 || columns <= 0 || num_batches <= 0) return true;
  const auto size = static_cast<int64_t>(numberSize(matrix.type));
  const int64_t bytes = size * ((columns - 1) * matrix.ld + rows);
  const Memory& memory = device()->memory();
  for (int64_t batch = 0; batch < num_batches; ++batch) {
    const uint64_t begin = matrix.address + batch * matrix.stride * size;
    if (!memory.isDevice(begin, bytes) && !memory.isRegistered(begin, bytes)) {
      return false;
    }
  }
  return true;
}

int submitBlas(void* stream, std::function<int()> body, bool wait) {
  if (libraryError() != kCudaSuccess) return kCublasExecutionFailed;
  Operation operation;
  operation.is_counted = true;
  operation.body = std::move(body);
  Point end;
  if (device()->submit(stream, std::move(operation), &end) != kCudaSuccess) {
    return kCublasExecutionFailed;
  }
  if (!wait) return kCublasSuccess;
  return device()->wait({end}) == kCudaSuccess ? kCublasSuccess
                                               : kCublasExecutionFailed;
}

}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int cublasCreate_v2(void** handle) {
  if (handle == nullptr) return kCublasInvalidValue;
  if (libraryError() != kCudaSuccess) return kCublasNotInitialized;
  auto made = std::make_unique<BlasHandle>();
  std::lock_guard<std::mutex> lock(handles_mutex);
  *handle = made.get();
  handles()[*handle] = std::move(made);
  return kCublasSuccess;
}

MNEMOSYNE_EXPORT int cublasDestroy_v2(void* handle) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  return handles().erase(handle) > 0 ? kCublasSuccess : kCublasNotInitialized;
}

MNEMOSYNE_EXPORT int cublasGetVersion_v2(void* handle, int* version) {
  return withHandle(handle, [&](BlasHandle&) { *version = 130100; });
}

MNEMOSYNE_EXPORT int cublasSetStream_v2(void* handle, void* stream) {
  return withHandle(handle, [&](BlasHandle& h) { h.stream = stream; });
}

MNEMOSYNE_EXPORT int cublasGetStream_v2(void* handle, void** stream) {
  return withHandle(handle, [&](BlasHandle& h) { *stream = h.stream; });
}

// Nothing here needs one.
MNEMOSYNE_EXPORT int cublasSetWorkspace_v2(void* handle, void* /*workspace*/,
                                           size_t /*size_bytes*/) {
  return withHandle(handle, [](BlasHandle&) {});
}

MNEMOSYNE_EXPORT int cublasSetMathMode(void* handle, int mode) {
  return withHandle(handle, [&](BlasHandle& h) { h.math_mode = mode; });
}

MNEMOSYNE_EXPORT int cublasGetMathMode(void* handle, int* mode) {
  return withHandle(handle, [&](BlasHandle& h) { *mode = h.math_mode; });
}

MNEMOSYNE_EXPORT int cublasSetPointerMode_v2(void* handle, int mode) {
  if (mode != 0 && mode != 1) return kCublasInvalidValue;
  return withHandle(handle, [&](BlasHandle& h) { h.pointer_mode = mode; });
}

MNEMOSYNE_EXPORT int cublasGetPointerMode_v2(void* handle, int* mode) {
  return withHandle(handle, [&](BlasHandle& h) { *mode = h.pointer_mode; });
}

MNEMOSYNE_EXPORT int cublasSetSmCountTarget(void* handle, int count) {
  return withHandle(handle, [&](BlasHandle& h) { h.sm_count_target = count; });
}

MNEMOSYNE_EXPORT int cublasGemmStridedBatchedEx(
    void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
    const void* a, int type_a, int lda, long long stride_a, const void* b,
    int type_b, int ldb, long long stride_b, const void* beta, void* c,
    int type_c, int ldc, long long stride_c, int num_batches, int compute_type,
    int /*algorithm*/) {
  return gemm(handle, {m, n, k, num_batches},
              {op_a, number(a), type_a, lda, stride_a},
              {op_b, number(b), type_b, ldb, stride_b},
              {0, number(c), type_c, ldc, stride_c}, alpha, beta, compute_type);
}

MNEMOSYNE_EXPORT int cublasGemmEx(void* handle, int op_a, int op_b, int m,
                                  int n, int k, const void* alpha,
                                  const void* a, int type_a, int lda,
                                  const void* b, int type_b, int ldb,
                                  const void* beta, void* c, int type_c,
                                  int ldc, int compute_type,
                                  int /*algorithm*/) {
  return gemm(handle, {m, n, k, 1}, {op_a, number(a), type_a, lda, 0},
              {op_b, number(b), type_b, ldb, 0}, {0, number(c), type_c, ldc, 0},
              alpha, beta, compute_type);
}

MNEMOSYNE_EXPORT int cublasSgemmEx(void* handle, int op_a, int op_b, int m,
                                   int n, int k, const float* alpha,
                                   const void* a, int type_a, int lda,
                                   const void* b, int type_b, int ldb,
                                   const float* beta, void* c, int type_c,
                                   int ldc) {
  return cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, b,
                      type_b, ldb, beta, c, type_c, ldc, kCompute32F, 0);
}

// The names for one type each.
#define GEMM(name, Number, type, compute)                                      \
  MNEMOSYNE_EXPORT int cublas##name##gemm_v2(                                  \
      void* handle, int op_a, int op_b, int m, int n, int k,                   \
      const Number* alpha, const Number* a, int lda, const Number* b, int ldb, \
      const Number* beta, Number* c, int ldc) {                                \
    return cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, a, type, lda, b,   \
                        type, ldb, beta, c, type, ldc, compute, 0);            \
  }                                                                            \
  MNEMOSYNE_EXPORT int cublas##name##gemmStridedBatched(                       \
      void* handle, int op_a, int op_b, int m, int n, int k,                   \
      const Number* alpha, const Number* a, int lda, long long stride_a,       \
      const Number* b, int ldb, long long stride_b, const Number* beta,        \
      Number* c, int ldc, long long stride_c, int num_batches) {               \
    return cublasGemmStridedBatchedEx(                                         \
        handle, op_a, op_b, m, n, k, alpha, a, type, lda, stride_a, b, type,   \
        ldb, stride_b, beta, c, type, ldc, stride_c, num_batches, compute, 0); \
  }
GEMM(S, float, kFloat32, kCompute32F)
GEMM(D, double, kFloat64, kCompute64F)
