// The numbers that matrices and collectives are made of. Halves are widened to
// float, computed with, and rounded to the nearest, ties to even.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemosyne::proxy::emulated {

struct Bfloat16 {
  uint16_t bits;

  Bfloat16() = default;
  explicit Bfloat16(float value) {
    const auto wide = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = value == value ? wide + 0x7fff + (wide >> 16 & 1)
                                            : wide | 0x400000;  // a quiet NaN
    bits = static_cast<uint16_t>(rounded >> 16);
  }
  operator float() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
};

struct Float16 {
  uint16_t bits;

  Float16() = default;
  explicit Float16(float value) {
    const auto wide = __builtin_bit_cast(uint32_t, value);
    const uint32_t magnitude = wide & 0x7fffffff;
    uint32_t half = 0x7c00;  // infinity, from 65520 on
    if (magnitude > 0x7f800000) {
      half = 0x7e00;
    } else if (magnitude < 0x38800000) {
      // Below 2^-14 a half counts units of 2^-24: those are the last places of
      // 0.5 and more, so that the addition rounds.
      const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
      half = __builtin_bit_cast(uint32_t, sum) & 0x7ff;
    } else if (magnitude < 0x477ff000) {
      // 13 bits of the fraction go, and the exponent's bias from 127 to 15.
      half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    bits = static_cast<uint16_t>((wide >> 16 & 0x8000) | half);
  }
  operator float() const {
    const uint32_t exponent = bits >> 10 & 31;
    const uint32_t fraction = bits & 0x3ff;
    float magnitude;
    if (exponent == 0) {
      magnitude = static_cast<float>(fraction) * 0x1p-24f;
    } else {
      const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
      magnitude = __builtin_bit_cast(float, wide << 23 | fraction << 13);
    }
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
};

// cudaDataType, as far as there are matrices of it.
enum NumberType : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBfloat16 = 14,
};

// Calls body(T()) with the type that `type` names. Returns whether there is
// one.
template <typename Body>
bool withNumberType(int type, Body&& body) {
  switch (type) {
    case kFloat32:
      body(float());
      return true;
    case kFloat64:
      body(double());
      return true;
    case kFloat16:
      body(Float16());
      return true;
    case kBfloat16:
      body(Bfloat16());
      return true;
    default:
      return false;
  }
}

// 0 for what is no NumberType.
inline size_t numberSize(int type) {
  size_t size = 0;
  withNumberType(type, [&](auto number) { size = sizeof number; });
  return size;
}

inline double readNumber(int type, const void* from, int64_t index = 0) {
  double value = 0;
  withNumberType(type, [&](auto number) {
    value = static_cast<const decltype(number)*>(from)[index];
  });
  return value;
}

inline void writeNumber(int type, void* to, int64_t index, double value) {
  withNumberType(type, [&](auto number) {
    using T = decltype(number);
    // Of a float already, except in double precision: no second rounding.
    if constexpr (sizeof(T) < sizeof(double)) {
      static_cast<T*>(to)[index] = T(static_cast<float>(value));
    } else {
      static_cast<T*>(to)[index] = value;
    }
  });
}

}  // namespace mnemosyne::proxy::emulated
