// Dropout. Which elements stay depends on the state of torch's generator and on
// the index of the element, by Philox as on a GPU; the numbers are not a GPU's.
#include <string>

#include "elementwise.h"
#include "kernels.h"
#include "tensor_info.h"

namespace mnemosyne::torch_kernels {
namespace {

struct PhiloxState {  // PhiloxCudaState, outside of CUDA graphs
  uint64_t seed, offset, offset_intragraph;
  bool is_captured;
};

// Philox 4x32-10 (Salmon and others, 2011): the first of its four numbers.
uint32_t philox(uint64_t seed, uint64_t offset, uint64_t index) {
  uint32_t counter[4] = {
      static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
      static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)};
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xd2511f53} * counter[0];
    const uint64_t product1 = uint64_t{0xcd9e8d57} * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += 0x9e3779b9;
    key1 += 0xbb67ae85;
  }
  return counter[0];
}

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
