// The largest elements of slices, and slices in order. Equal ones keep theirs.
#include <algorithm>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tensor_info.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;
using Index = uint32_t;

// sbtopk::gatherTopK; torch sorts what it gives by another kernel.
template <typename T>
void gatherTop(const Launch&, const TensorInfo<const T, Index>& from,
               Index size, Index count, bool is_largest, Index num_slices,
               Index stride, const TensorInfo<T, Index>& to, Index to_stride,
               const TensorInfo<int64_t, Index>& places, Index places_stride,
               T*) {
  for (Index slice = 0; slice < num_slices; ++slice) {
    const T* values = &from.at(slice);
    std::vector<Index> order(size);
    for (Index i = 0; i < size; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
      const T left = values[a * stride], right = values[b * stride];
      return is_largest ? left > right : left < right;
    });
    for (Index i = 0; i < count; ++i) {
      (&to.at(slice))[i * to_stride] = values[order[i] * stride];
      (&places.at(slice))[i * places_stride] = order[i];
    }
  }
}

// bitonicSortKVInPlace, of up to 32 elements.
template <typename T, typename IsBefore>
void sort(const Launch&, const TensorInfo<T, Index>& keys, Index num_slices,
          Index size, Index stride, const TensorInfo<int64_t, Index>& values,
          Index values_stride, char) {
  for (Index slice = 0; slice < num_slices; ++slice) {
    T* const key = &keys.at(slice);
    int64_t* const value = &values.at(slice);
    std::vector<std::pair<T, int64_t>> pairs(size);
    for (Index i = 0; i < size; ++i) {
      pairs[i] = {key[i * stride], value[i * values_stride]};
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](auto& a, auto& b) {
      return IsBefore()(a.first, b.first);
    });
    for (Index i = 0; i < size; ++i) {
      std::tie(key[i * stride], value[i * values_stride]) = pairs[i];
    }
  }
}

}  // namespace

void addSorting(RegisterKernel* add_to) {
  add_to("_ZN2at6native6sbtopk10gatherTopKIfjLi*", onHost<gatherTop<float>>);
  const std::string bitonic = "_ZN2at6native20bitonicSortKVInPlaceILi*EflNS0_4";
  add_to((bitonic + "GTOpIfLb1EEEjEE*").c_str(),
         onHost<sort<float, std::greater<float>>>);
  add_to((bitonic + "LTOpIfLb1EEEjEE*").c_str(),
         onHost<sort<float, std::less<float>>>);
}

}  // namespace mnemosyne::torch_kernels
