// Random numbers by their place, as of torch's generator on a GPU.
#pragma once

#include <cstdint>

namespace mnemosyne::torch_kernels {

struct PhiloxState {  // PhiloxCudaState, outside of CUDA graphs
  uint64_t seed, offset, offset_intragraph;
  bool is_captured;
};

// Philox 4x32-10 (Salmon and others, 2011): the first of its four numbers.
inline uint32_t philox(uint64_t seed, uint64_t offset, uint64_t index) {
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

}  // namespace mnemosyne::torch_kernels
