// Rows by their numbers, embeddings, and triangles.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensor_info.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

void gather(const Launch& launch, char* to, const char* from,
            const int64_t* indices, int num_indices, int64_t slice_bytes,
            int64_t num_slices, int64_t from_stride, int64_t to_stride,
            bool allows_negative) {
  for (int i = 0; i < num_indices; ++i) {
    int64_t index = indices[i];
    if (allows_negative && index < 0) index += num_slices;
    if (index < 0 || index >= num_slices) {
      return launch.fail(proxy::kCudaAssert);
    }
    std::memcpy(to + i * to_stride, from + index * from_stride, slice_bytes);
  }
}

// The captures of gpu_index_kernel's lambda, in the order of their first use.
struct ByIndices {
  Offsets<3> offsets;
  char* to;
  const char* from;
  size_t num_indices;
  const char* indices[kMaxDims];
  int64_t sizes[kMaxDims], strides[kMaxDims];
  char copy;
};

// index: what lies at the indices; index_put: to there.
template <typename T, bool is_put>
void byIndices(const Launch& launch, int64_t count, const ByIndices& by) {
  by.offsets.forEach(count, [&](const auto& offsets) {
    int64_t place = 0;
    for (size_t i = 0; i < by.num_indices; ++i) {
      int64_t index = 0;
      std::memcpy(&index, by.indices[i] + offsets[2], sizeof index);
      if (index < 0) index += by.sizes[i];
      if (index < 0 || index >= by.sizes[i]) {
        return launch.fail(proxy::kCudaAssert);
      }
      place += index * by.strides[i];
    }
    std::memcpy(by.to + offsets[0] + (is_put ? place : 0),
                by.from + offsets[1] + (is_put ? 0 : place), sizeof(T));
  });
}

// The captures of _cuda_scatter_fill_internal_kernel's lambda.
struct Fill {
  Offsets<2> offsets;
  const char* indices;
  int64_t size;
  char nothing;
  char* to;
  int64_t stride, num_elements, value;
};

// The same number to where indices along one dimension say.
void fillByIndices(const Launch& launch, int count, const Fill& by) {
  by.offsets.forEach(count, [&](const auto& offsets) {
    int64_t index = 0;
    std::memcpy(&index, by.indices + offsets[1], sizeof index);
    if (index < 0 || index >= by.size) return launch.fail(proxy::kCudaAssert);
    std::memcpy(by.to + offsets[0] + index * by.stride * sizeof by.value,
                &by.value, sizeof by.value);
  });
}

// The captures of _cuda_scatter_gather_internal_kernel's lambda.
struct Scatter {
  Offsets<3> offsets;
  const char* indices;
  int64_t size;
  char nothing;
  char* to;
  int64_t stride, num_elements;
  const char* from;
};

// Numbers to where indices along one dimension say.
void scatter(const Launch& launch, int count, const Scatter& by) {
  by.offsets.forEach(count, [&](const auto& offsets) {
    int64_t index = 0;
    std::memcpy(&index, by.indices + offsets[2], sizeof index);
    if (index < 0 || index >= by.size) return launch.fail(proxy::kCudaAssert);
    std::memcpy(by.to + offsets[0] + index * by.stride * sizeof(int64_t),
                by.from + offsets[1], sizeof(int64_t));
  });
}

// indexFuncLargeIndex: adds slices to those that the indices name.
template <typename T, bool is_index_major>
void addSlices(const Launch&, const TensorInfo<T, uint32_t>& to,
               const TensorInfo<const T, uint32_t>& from,
               const TensorInfo<const int64_t, uint32_t>& indices, int to_dim,
               int from_dim, uint32_t count, uint32_t inner, int64_t, int64_t,
               const void*, T factor) {
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t index = is_index_major ? i / inner : i % inner;
    const uint32_t place = is_index_major ? i % inner : i / inner;
    T& sum = (&to.at(place))[indices.at(index) * to.strides[to_dim]];
    sum += (&from.at(place))[index * from.strides[from_dim]] * factor;
  }
}

template <typename T>
void addByIndices(RegisterKernel* add_to) {
  const auto add = [&](const std::string& in, auto* kernel) {
    add_to(("_ZN2at6native24index_elementwise_kernel*" + in +
            "INS0_10OpaqueTypeILi" + std::to_string(sizeof(T)) + "EEE*")
               .c_str(),
           kernel);
  };
  add("17index_kernel_impl", onHost<byIndices<T, false>>);
  add("21index_put_kernel_impl", onHost<byIndices<T, true>>);
}

// Adds to gradients that begin with zeros.
template <typename T>
void embeddingBackward(const Launch&, const int64_t* indices,
                       const T* gradients, T* weights, int num_indices,
                       int64_t stride, int padding) {
  std::map<int64_t, std::vector<float>> rows;
  for (int i = 0; i < num_indices; ++i) {
    if (indices[i] == padding) continue;
    auto& row = rows[indices[i]];
    row.resize(stride);
    for (int64_t k = 0; k < stride; ++k) row[k] += gradients[i * stride + k];
  }
  for (const auto& [index, row] : rows) {
    for (int64_t k = 0; k < stride; ++k) {
      T& weight = weights[index * stride + k];
      weight = convert<T>(static_cast<float>(weight) + row[k]);
    }
  }
}

template <typename T, typename Index, bool is_upper>
void triangle(const Launch&, const TensorInfo<T, Index>& to,
              const TensorInfo<const T, Index>& from, int64_t diagonal, int64_t,
              Index) {
  const Index num_columns = to.sizes[to.dims - 1];
  const Index num_rows = to.sizes[to.dims - 2];
  for (Index i = 0; i < to.count(); ++i) {
    const int64_t column = i % num_columns;
    const int64_t row = i / num_columns % num_rows;
    const bool is_kept =
        is_upper ? column - row >= diagonal : column - row <= diagonal;
    to.at(i) = is_kept ? from.at(i) : T{};
  }
}

template <typename T>
void addTriangles(RegisterKernel* add_to) {
  const auto add = [&](const std::string& rest, auto* kernel) {
    add_to(
        ("_ZN2at6native16triu_tril_kernelI" + std::string(mangled<T>()) + rest)
            .c_str(),
        kernel);
  };
  add("iLb1E*", onHost<triangle<T, int, true>>);
  add("iLb0E*", onHost<triangle<T, int, false>>);
}

}  // namespace

void addIndexing(RegisterKernel* add_to) {
  add_to("_ZN2at6native24vectorized_gather_kernelILi*ElE*", onHost<gather>);
  add_to(
      "_ZN2at6native34_scatter_gather_elementwise_kernelILi*"
      "34_cuda_scatter_fill_internal_kernel*OpaqueTypeILi8E*TensorAssign*",
      onHost<fillByIndices>);
  add_to(
      "_ZN2at6native34_scatter_gather_elementwise_kernelILi*"
      "36_cuda_scatter_gather_internal_kernelILb1E*OpaqueTypeILi8EEEl*"
      "TensorAssign*",
      onHost<scatter>);
  add_to("_ZN2at6native19indexFuncLargeIndexIfljLi*ELb1E*9ReduceAdd*",
         onHost<addSlices<float, true>>);
  add_to("_ZN2at6native19indexFuncLargeIndexIfljLi*ELb0E*9ReduceAdd*",
         onHost<addSlices<float, false>>);
  addByIndices<uint8_t>(add_to);
  addByIndices<uint16_t>(add_to);
  addByIndices<uint32_t>(add_to);
  addByIndices<uint64_t>(add_to);
  addTriangles<bool>(add_to);
  forFloating([&](auto number) {
    using T = decltype(number);
    addTriangles<T>(add_to);
    add_to((std::string("_ZN*33embedding_backward_feature_kernelI") +
            mangled<T>() + "flE*")
               .c_str(),
           onHost<embeddingBackward<T>>);
  });
}

}  // namespace mnemosyne::torch_kernels
