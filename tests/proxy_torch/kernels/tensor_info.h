// A tensor of any strides, as cuda::detail::TensorInfo tells a kernel of it.
#pragma once

#include <cstdint>

#include "offsets.h"

namespace mnemosyne::torch_kernels {

template <typename T, typename Index>
struct TensorInfo {
  T* data;
  Index sizes[kMaxDims], strides[kMaxDims];
  int dims;

  // The element of this index; the last dimension is the fastest.
  T& at(Index index) const {
    Index offset = 0;
    for (int dim = dims - 1; dim > 0; --dim) {
      offset += index % sizes[dim] * strides[dim];
      index /= sizes[dim];
    }
    return data[offset + index * strides[0]];
  }

  Index count() const {
    Index count = 1;
    for (int dim = 0; dim < dims; ++dim) count *= sizes[dim];
    return count;
  }
};

}  // namespace mnemosyne::torch_kernels
