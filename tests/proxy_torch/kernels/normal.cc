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
template <typename T>
struct Transform {  // of distribution_nullary_kernel, where the output is one
                    // row
  T* to;
  int stride;
  float mean, deviation;
};

template <typename T>
void fill(const Launch& launch, int64_t count, const PhiloxState& state,
          Distribution, const Transform<T>& by) {
  if (state.is_captured) return launch.fail(proxy::kCudaNotSupported);
  for (int64_t i = 0; i < count; ++i) {
    // Above zero, for the logarithm.
    const auto uniform = [&](int64_t index) {
      return (static_cast<float>(philox(state.seed, state.offset, index)) + 1) *
             0x1p-32f;
    };
    const float radius = std::sqrt(-2 * std::log(uniform(2 * i)));
    const float angle = 2 * std::numbers::pi_v<float> * uniform(2 * i + 1);
    auto* const to =
        reinterpret_cast<T*>(reinterpret_cast<char*>(by.to) + i * by.stride);
    *to = convert<T>(by.mean + by.deviation * (radius * std::cos(angle)));
  }
}

}  // namespace

void addNormal(RegisterKernel* add_to) {
  forFloating([&](auto number) {
    using T = decltype(number);
    add_to((std::string("_ZN2at6native*43distribution_elementwise_grid_stride_"
                        "kernelIfLi4E*20normal_and_transformI") +
            mangled<T>() + "f*_")
               .c_str(),
           onHost<fill<T>>);
  });
}

}  // namespace mnemosyne::torch_kernels
