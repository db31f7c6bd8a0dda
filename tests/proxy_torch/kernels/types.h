// The types that torch's kernels are instantiated with, their names in mangled
// names and in c10::ScalarType, and what they are computed in.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "proxy/emulated/numbers.h"

namespace mnemosyne::torch_kernels {

using proxy::emulated::Bfloat16;
using proxy::emulated::Float16;

template <typename T>
constexpr bool is_half =
    std::is_same_v<T, Bfloat16> || std::is_same_v<T, Float16>;

template <typename T>
constexpr bool is_floating = std::is_floating_point_v<T> || is_half<T>;

// at::opmath_type: halves are computed with as floats.
template <typename T>
using Wide = std::conditional_t<is_half<T>, float, T>;

template <typename To, typename From>
To convert(From from) {
  if constexpr (is_half<To>) {
    return To(static_cast<float>(from));
  } else {
    return static_cast<To>(static_cast<Wide<From>>(from));
  }
}

// The type's part of a mangled name.
template <typename T>
const char* mangled() {
  if constexpr (std::is_same_v<T, Bfloat16>) return "N3c108BFloat16E";
  if constexpr (std::is_same_v<T, Float16>) return "N3c104HalfE";
  if constexpr (std::is_same_v<T, float>) return "f";
  if constexpr (std::is_same_v<T, double>) return "d";
  if constexpr (std::is_same_v<T, bool>) return "b";
  if constexpr (std::is_same_v<T, uint8_t>) return "h";
  if constexpr (std::is_same_v<T, int8_t>) return "a";
  if constexpr (std::is_same_v<T, int16_t>) return "s";
  if constexpr (std::is_same_v<T, int32_t>) return "i";
  if constexpr (std::is_same_v<T, int64_t>) return "l";
}

// The same where the type is named again, and a part of it stands for itself.
template <typename T>
const char* mangledAgain() {
  return std::is_same_v<T, Bfloat16> ? "*8BFloat16E" : mangled<T>();
}

// Calls body(T()) for the types that models are trained in here.
template <typename Body>
void forFloating(Body&& body) {
  body(float());
  body(Bfloat16());
}

// Calls body(T()) with the type of a c10::ScalarType. Returns whether there is
// one.
template <typename Body>
bool withScalarType(int8_t type, Body&& body) {
  switch (type) {
    case 0:
      body(uint8_t());
      return true;
    case 1:
      body(int8_t());
      return true;
    case 2:
      body(int16_t());
      return true;
    case 3:
      body(int32_t());
      return true;
    case 4:
      body(int64_t());
      return true;
    case 5:
      body(Float16());
      return true;
    case 6:
      body(float());
      return true;
    case 7:
      body(double());
      return true;
    case 11:
      body(bool());
      return true;
    case 15:
      body(Bfloat16());
      return true;
    default:
      return false;
  }
}

}  // namespace mnemosyne::torch_kernels
