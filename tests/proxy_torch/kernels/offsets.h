// Where the elements of tensors lie: what OffsetCalculator of torch tells a
// kernel.
#pragma once

#include <array>
#include <cstdint>

namespace mnemosyne::torch_kernels {

constexpr int kMaxDims = 25;

// A divisor, and what a GPU multiplies by in the place of a division.
struct IntDivider {
  uint32_t divisor, magic, shift;
};

// Laid out as OffsetCalculator<num_tensors, uint32_t>; the first dimension is
// the fastest.
template <int num_tensors>
struct Offsets {
  int dims;
  IntDivider sizes[kMaxDims];
  uint32_t strides[kMaxDims][num_tensors];

  std::array<uint32_t, num_tensors> of(uint32_t index) const {
    std::array<uint32_t, num_tensors> offsets = {};
    for (int dim = 0; dim < dims; ++dim) {
      const uint32_t rest = index / sizes[dim].divisor;
      const uint32_t position = index - rest * sizes[dim].divisor;
      index = rest;
      for (int i = 0; i < num_tensors; ++i) {
        offsets[i] += position * strides[dim][i];
      }
    }
    return offsets;
  }

  // Calls body(offsets) for the first `count` indices, in their order.
  template <typename Body>
  void forEach(uint32_t count, Body&& body) const {
    uint32_t position[kMaxDims] = {};
    std::array<uint32_t, num_tensors> offsets = {};
    for (uint32_t index = 0; index < count; ++index) {
      body(offsets);
      for (int dim = 0; dim < dims; ++dim) {
        const bool is_end = ++position[dim] == sizes[dim].divisor;
        for (int i = 0; i < num_tensors; ++i) {
          offsets[i] += strides[dim][i];
          if (is_end) offsets[i] -= strides[dim][i] * sizes[dim].divisor;
        }
        if (!is_end) break;
        position[dim] = 0;
      }
    }
  }
};

}  // namespace mnemosyne::torch_kernels
