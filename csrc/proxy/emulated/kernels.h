// Host functions that stand in for the kernels of fat binaries. Writers of such
// functions need nothing but this header; the emulated device finds them under
// the name that the kernel has in its fat binary (the mangled one):
//
//   void add(const Launch& launch, float* y, const float* x) {
//     forEachThread(launch, [&](Dim3 block, Dim3 thread) {
//       const size_t i = block.x * launch.block.x + thread.x;
//       y[i] += x[i];
//     });
//   }
//
//   extern "C" void mnemosyne_register_kernels(RegisterKernel* add_to) {
//     add_to("_Z3addPfPKf", onHost<add>);
//   }
//
// In a name, `*` stands for anything: one function for many instances of a
// template. A library with such functions is named in the environment variable
// MNEMOSYNE_EMULATED_KERNELS: paths with colons in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "proxy/cuda_abi.h"

namespace mnemosyne::proxy::emulated {

struct Launch {
  Dim3 grid;
  Dim3 block;
  uint32_t shared_bytes = 0;
  const std::byte* parameters = nullptr;
  size_t parameters_bytes = 0;
  // What the device breaks with, a CudaError; see fail().
  mutable int error = kCudaSuccess;

  // The parameter that begins at `offset`. One that lies beyond what was passed
  // is a zero, and breaks the device.
  template <typename T>
  T parameter(size_t offset) const {
    alignas(T) std::byte bytes[sizeof(T)] = {};
    if (offset + sizeof(T) > parameters_bytes) {
      fail(kCudaIllegalAddress);
    } else {
      std::memcpy(bytes, parameters + offset, sizeof(T));
    }
    return *reinterpret_cast<T*>(bytes);
  }

  // What __trap or a failed assert does: the device takes no more work.
  void fail(int with) const { error = with; }

  size_t numThreads() const {
    return size_t{1} * grid.x * grid.y * grid.z * block.x * block.y * block.z;
  }
};

using Kernel = void(const Launch&);
using RegisterKernel = void(const char* device_name, Kernel* kernel);

// Calls body(block, thread) for each thread of the grid, one after the other.
// It does for kernels whose threads do not talk to each other.
template <typename Body>
void forEachThread(const Launch& launch, Body&& body) {
  Dim3 block, thread;
  for (block.z = 0; block.z < launch.grid.z; ++block.z)
    for (block.y = 0; block.y < launch.grid.y; ++block.y)
      for (block.x = 0; block.x < launch.grid.x; ++block.x)
        for (thread.z = 0; thread.z < launch.block.z; ++thread.z)
          for (thread.y = 0; thread.y < launch.block.y; ++thread.y)
            for (thread.x = 0; thread.x < launch.block.x; ++thread.x)
              body(block, thread);
}

// Calls the function with what it wants, taken from where C++ lays the
// parameters. One that wants others than were passed breaks the device.
template <auto function, typename... Parameters>
void call(const Launch& launch, void (*)(const Launch&, Parameters...)) {
  size_t end = 0;
  [[maybe_unused]] const auto place = [&end](size_t alignment, size_t size) {
    const size_t begin = (end + alignment - 1) / alignment * alignment;
    end = begin + size;
    return begin;
  };
  // In braces the order is from the left to the right.
  const std::tuple<std::decay_t<Parameters>...> parameters{
      launch.parameter<std::decay_t<Parameters>>(
          place(alignof(Parameters), sizeof(Parameters)))...};
  if (end != launch.parameters_bytes) launch.fail(kCudaInvalidValue);
  if (launch.error != kCudaSuccess) return;
  std::apply([&](auto&... each) { function(launch, each...); }, parameters);
}

// The kernel whose parameters are those of the function behind the launch.
template <auto function>
void onHost(const Launch& launch) {
  call<function>(launch, function);
}

}  // namespace mnemosyne::proxy::emulated
