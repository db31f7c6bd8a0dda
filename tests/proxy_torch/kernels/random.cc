// Normally distributed numbers, which weights begin with: by Philox as on a
// GPU, but not a GPU's.
#include <cmath>
#include <numbers>
#include <string>

#include "kernels.h"
#include "philox.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

struct Distribution {  // an empty lambda
  char nothing;
};

// Both make a number of type T from two that are uniform above 0, up to 1.
template <typename T>
struct Normal {
  float mean, deviation;
  T operator()(float u, float v) const {
    const float radius = std::sqrt(-2 * std::log(u));
    const float angle = 2 * std::numbers::pi_v<float> * v;
    return convert<T>(mean + deviation * (radius * std::cos(angle)));
  }
};
template <typename T>
struct Uniform {
  float range;
  T from, to;
  T operator()(float u, float) const {
    const T value = convert<T>(u * range + static_cast<float>(from));
    return static_cast<float>(value) == static_cast<float>(to) ? from : value;
  }
};

// Of distribution_nullary_kernel, where the output is one row.
template <typename T, typename Function>
struct Transform {
  T* to;
  int stride;
  Function function;
};

template <typename T, typename Function>
void fill(const Launch& launch, int64_t count, const PhiloxState& state,
          Distribution, const Transform<T, Function>& by) {
  if (state.is_captured) return launch.fail(proxy::kCudaNotSupported);
  for (int64_t i = 0; i < count; ++i) {
    const auto uniform = [&](int64_t index) {
      return (static_cast<float>(philox(state.seed, state.offset, index)) + 1) *
             0x1p-32f;
    };
    auto* const to =
        reinterpret_cast<T*>(reinterpret_cast<char*>(by.to) + i * by.stride);
    *to = by.function(uniform(2 * i), uniform(2 * i + 1));
  }
}

template <typename T, typename Function>
void add(RegisterKernel* add_to, const std::string& name) {
  add_to(("_ZN2at6native*43distribution_elementwise_grid_stride_kernelIfLi4E*" +
          name + "I" + mangled<T>() + "f*_")
             .c_str(),
         onHost<fill<T, Function>>);
}

}  // namespace

void addRandom(RegisterKernel* add_to) {
  forFloating([&](auto number) {
    using T = decltype(number);
    add<T, Normal<T>>(add_to, "20normal_and_transform");
    add<T, Uniform<T>>(add_to, "21uniform_and_transform");
  });
}

}  // namespace mnemosyne::torch_kernels
