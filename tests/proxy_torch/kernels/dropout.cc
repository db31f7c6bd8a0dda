// Dropout. Which elements stay depends on the state of torch's generator and on
// the index of the element, by Philox as on a GPU; the numbers are not a GPU's.
#include <string>

#include "elementwise.h"
#include "kernels.h"
#include "philox.h"
#include "tensor_info.h"

namespace mnemosyne::torch_kernels {
namespace {

template <typename T, typename Mask>
void dropOut(const Launch& launch, const TensorInfo<const T, uint32_t>& from,
             const TensorInfo<T, uint32_t>& to,
             const TensorInfo<Mask, uint32_t>& mask, uint32_t count, float kept,
             const PhiloxState& state) {
  if (state.is_captured) return launch.fail(proxy::kCudaNotSupported);
  for (uint32_t i = 0; i < count; ++i) {
    const float uniform =
        static_cast<float>(philox(state.seed, state.offset, i)) * 0x1p-32f;
    const bool is_kept = uniform < kept;
    to.at(i) = convert<T>(is_kept ? from.at(i) * (1 / kept) : 0.0f);
    mask.at(i) = is_kept;
  }
}

template <typename T>
struct MaskedScale {
  float scale;
  EndOfCaptures end;
  T operator()(T value, bool mask) const {
    return convert<T>(mask ? value * scale : 0.0f);
  }
};

}  // namespace

void addDropout(RegisterKernel* add_to) {
  forFloating([&](auto number) {
    using T = decltype(number);
    for (const char* name :
         {"24fused_dropout_kernel_vec", "20fused_dropout_kernel"}) {
      add_to((std::string("_ZN2at6native*") + name + "I" + mangled<T>() +
              "fjLi*EbE*")
                 .c_str(),
             onHost<dropOut<T, bool>>);
    }
    addElementwise<MaskedScale<T>>(
        add_to, "Z*19masked_scale_kernelIb*EUl" +
                    std::string(std::is_same_v<T, float> ? "f" : "S*_") +
                    "bE_");
  });
}

}  // namespace mnemosyne::torch_kernels
