// Kernels that compute each element by itself. A functor with the captures and
// the types of torch's is all that an operation needs: the forms that torch
// launches it in (ATen/native/cuda/CUDALoops.cuh) are here.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "offsets.h"
#include "proxy/emulated/kernels.h"
#include "types.h"

namespace mnemosyne::torch_kernels {

using proxy::emulated::Launch;
using proxy::emulated::onHost;
using proxy::emulated::RegisterKernel;

template <typename Member>
struct MemberTraits;
template <typename Functor, typename R, typename... As>
struct MemberTraits<R (Functor::*)(As...) const> {
  using Result = R;
  using Arguments = std::tuple<As...>;
  using Indices = std::index_sequence_for<As...>;
  static constexpr int num_inputs = sizeof...(As);
};
template <typename Functor>
using Traits = MemberTraits<decltype(&Functor::operator())>;

// The output, then the inputs.
template <typename Functor>
using Pointers = std::array<char*, Traits<Functor>::num_inputs + 1>;
template <typename Functor>
using ScalarTypes = std::array<int8_t, Traits<Functor>::num_inputs + 1>;
template <typename Functor, size_t i>
using Argument = std::tuple_element_t<i, typename Traits<Functor>::Arguments>;

// Behind what a lambda for host and device captures, nvcc has a pointer that
// only the host reads.
struct EndOfCaptures {
  const void* of_host;
};

template <typename T>
T load(const char* from, size_t offset = 0) {
  T value;
  std::memcpy(&value, from + offset, sizeof value);
  return value;
}

template <typename T>
T loadAs(int8_t type, const char* from) {
  T value = {};
  withScalarType(type, [&](auto number) {
    value = convert<T>(load<decltype(number)>(from));
  });
  return value;
}

template <typename T>
void storeAs(int8_t type, char* to, T value) {
  withScalarType(type, [&](auto number) {
    number = convert<decltype(number)>(value);
    std::memcpy(to, &number, sizeof number);
  });
}

inline size_t sizeOf(int8_t type) {
  size_t size = 0;
  withScalarType(type, [&](auto number) { size = sizeof number; });
  return size;
}

template <typename Functor, size_t... i>
void computeInOrder(int count, const Functor& functor,
                    const Pointers<Functor>& data, std::index_sequence<i...>) {
  auto* const out =
      reinterpret_cast<typename Traits<Functor>::Result*>(data[0]);
  [[maybe_unused]] const auto in = std::make_tuple(
      reinterpret_cast<const Argument<Functor, i>*>(data[i + 1])...);
  for (int index = 0; index < count; ++index) {
    out[index] = functor(std::get<i>(in)[index]...);
  }
}

template <typename Functor, size_t... i>
void computeAt(const Functor& functor, const Pointers<Functor>& data,
               const std::array<uint32_t, sizeof...(i) + 1>& offsets,
               std::index_sequence<i...>) {
  const auto value =
      functor(load<Argument<Functor, i>>(data[i + 1], offsets[i + 1])...);
  std::memcpy(data[0] + offsets[0], &value, sizeof value);
}

template <typename Functor, size_t... i>
void computeWithCasts(const Functor& functor, const Pointers<Functor>& data,
                      const std::array<uint32_t, sizeof...(i) + 1>& offsets,
                      const ScalarTypes<Functor>& types,
                      std::index_sequence<i...>) {
  storeAs(types[0], data[0] + offsets[0],
          functor(loadAs<Argument<Functor, i>>(
              types[i + 1], data[i + 1] + offsets[i + 1])...));
}

template <typename Functor>
void inOrder(const Launch&, int count, const Functor& functor,
             const Pointers<Functor>& data) {
  computeInOrder(count, functor, data, typename Traits<Functor>::Indices());
}

// Empty, and a byte long: TrivialOffsetCalculator, for inputs and output, and
// what loads and stores without a cast.
struct InOrder {
  char nothing;
};
template <typename Functor>
void inOrderUnrolled(const Launch& launch, int count, const Functor& functor,
                     const Pointers<Functor>& data, InOrder, InOrder, InOrder,
                     InOrder) {
  inOrder(launch, count, functor, data);
}

template <size_t num_tensors>
struct WithCasts {
  std::array<int8_t, num_tensors> types;
  std::array<uint32_t, num_tensors> sizes;
};

template <typename Functor>
void inOrderWithCasts(
    const Launch&, int count, const Functor& functor,
    const Pointers<Functor>& data, InOrder, InOrder,
    const WithCasts<std::max(Traits<Functor>::num_inputs, 1)>& loader,
    const WithCasts<1>& storer) {
  constexpr int num_inputs = Traits<Functor>::num_inputs;
  ScalarTypes<Functor> types = {storer.types[0]};
  std::array<uint32_t, num_inputs + 1> steps = {storer.sizes[0]}, offsets = {};
  for (int i = 0; i < num_inputs; ++i) {
    types[i + 1] = loader.types[i];
    steps[i + 1] = loader.sizes[i];
  }
  for (int index = 0; index < count; ++index) {
    computeWithCasts(functor, data, offsets, types,
                     typename Traits<Functor>::Indices());
    for (int i = 0; i <= num_inputs; ++i) offsets[i] += steps[i];
  }
}

// The captures of the lambdas in gpu_kernel_impl, in their order.
template <typename Functor>
struct Strided {
  Offsets<Traits<Functor>::num_inputs + 1> offsets;
  Pointers<Functor> data;
  Functor functor;
  EndOfCaptures end;
};
template <typename Functor>
struct StridedWithCasts {
  Offsets<Traits<Functor>::num_inputs + 1> offsets;
  Pointers<Functor> data;
  Functor functor;
  ScalarTypes<Functor> types;
  EndOfCaptures end;
};

template <typename Functor>
void strided(const Launch&, int count, const Strided<Functor>& by) {
  by.offsets.forEach(count, [&](const auto& offsets) {
    computeAt(by.functor, by.data, offsets,
              typename Traits<Functor>::Indices());
  });
}

template <typename Functor>
void stridedWithCasts(const Launch&, int count,
                      const StridedWithCasts<Functor>& by) {
  by.offsets.forEach(count, [&](const auto& offsets) {
    computeWithCasts(by.functor, by.data, offsets, by.types,
                     typename Traits<Functor>::Indices());
  });
}

// A lambda in the function `in` (with the length in front, as mangled), that
// gets a number of this type, and then of those.
template <typename T, typename... Ts>
std::string lambda(const std::string& in, const char* suffix = "E_") {
  [[maybe_unused]] const auto next = []<typename U>(const U*) -> std::string {
    return is_half<U> ? "S*_" : mangled<U>();  // named before
  };
  return "Z*" + in + "*EUl" + mangledAgain<T>() +
         (next(static_cast<Ts*>(nullptr)) + ... + std::string()) + suffix;
}

// Registers the forms of the kernel whose functor has this mangled name.
template <typename Functor>
void addElementwise(RegisterKernel* add_to, const std::string& functor) {
  const std::string space = "_ZN2at6native";
  const auto add = [&](const std::string& pattern, proxy::emulated::Kernel* f) {
    add_to(pattern.c_str(), f);
  };
  add(space + "29vectorized_elementwise_kernelILi*E" + functor + "St5arrayI*",
      onHost<inOrder<Functor>>);
  add(space + "27unrolled_elementwise_kernelI" + functor +
          "St5arrayI*LoadWithoutCast*StoreWithoutCast*",
      onHost<inOrderUnrolled<Functor>>);
  add(space + "27unrolled_elementwise_kernelI" + functor +
          "St5arrayI*LoadWithCast*StoreWithCast*",
      onHost<inOrderWithCasts<Functor>>);
  add(space + "18elementwise_kernelILi*gpu_kernel_impl_nocastI" + functor +
          "EEv*RKT_EUliE*",
      onHost<strided<Functor>>);
  add(space + "18elementwise_kernelILi*gpu_kernel_implI" + functor +
          "EEv*RKT_EUliE*",
      onHost<stridedWithCasts<Functor>>);
}

}  // namespace mnemosyne::torch_kernels
