// What ccl/reduce_ops.h promises, one number after the other, and nothing else.
#pragma once

#include <bit>
#include <complex>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "ccl/reduce_ops.h"

namespace mnemosyne::testing {

struct Truth {
  uint8_t bits;
  uint8_t wide() const { return bits != 0; }
  static Truth from(uint8_t value) { return {value != 0}; }
};

struct Brain {
  uint16_t bits;
  float wide() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static Brain from(float value) {
    const auto wide = std::bit_cast<uint32_t>(value);
    if (value != value) return {static_cast<uint16_t>(wide >> 16 | 0x40)};
    return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
  }
};

struct Half {
  uint16_t bits;
  float wide() const {
    const uint32_t sign = uint32_t{bits} << 16 & 0x80000000;
    const uint32_t exponent = bits >> 10 & 0x1f;
    const uint32_t mantissa = bits & 0x3ff;
    if (exponent == 0) {
      const float value = static_cast<float>(mantissa) * 0x1p-24f;
      return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
    }
    const uint32_t biased = exponent == 0x1f ? 0xff : exponent + 112;
    return std::bit_cast<float>(sign | biased << 23 | mantissa << 13);
  }
  static Half from(float value) {
    const auto wide = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>(wide >> 16 & 0x8000);
    const uint32_t magnitude = wide & 0x7fffffff;
    if (magnitude > 0x7f800000)  // NaN: quiet, with what fits of its payload
      return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
    if (magnitude >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      const uint32_t units = std::bit_cast<uint32_t>(shifted) - 0x3f000000;
      return {static_cast<uint16_t>(sign | units)};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13)};
  }
};

inline float quiet(float nan) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nan) | 1u << 22);
}
inline double quiet(double nan) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(nan) | 1ull << 51);
}

template <typename T>
T combineNumbers(ccl::ReduceOp op, T a, T b) {
  using ccl::ReduceOp;
  const bool is_sum = op == ReduceOp::kSum || op == ReduceOp::kAverage;
  if constexpr (std::is_floating_point_v<T>) {
    if (is_sum || op == ReduceOp::kProduct) {
      if (a != a) return quiet(a);
      if (b != b) return quiet(b);
      return is_sum ? a + b : a * b;
    }
  } else {
    const auto x = static_cast<uint64_t>(a);
    const auto y = static_cast<uint64_t>(b);
    if (is_sum) return static_cast<T>(x + y);
    if (op == ReduceOp::kProduct) return static_cast<T>(x * y);
    if (op == ReduceOp::kBitAnd) return static_cast<T>(x & y);
    if (op == ReduceOp::kBitOr) return static_cast<T>(x | y);
    if (op == ReduceOp::kBitXor) return static_cast<T>(x ^ y);
  }
  if (op == ReduceOp::kMin) return b < a || b != b ? b : a;
  if (op == ReduceOp::kMax) return a < b || b != b ? b : a;
  throw std::logic_error("no such reduction");
}

template <typename T>
T divideNumber(T value, int divisor) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(static_cast<int64_t>(value) / divisor);
  else
    return value / static_cast<T>(divisor);
}

// Calls use(bytes of a number, its type) with every number of the buffer.
template <typename Use>
void eachNumber(ccl::DataType type, size_t num_bytes, Use use) {
  const auto all = [&](auto kind) {
    for (size_t i = 0; i < num_bytes; i += sizeof(kind)) use(i, kind);
  };
  switch (type) {
    case ccl::DataType::kBool:
      return all(Truth{});
    case ccl::DataType::kInt8:
      return all(int8_t{});
    case ccl::DataType::kUint8:
      return all(uint8_t{});
    case ccl::DataType::kInt16:
      return all(int16_t{});
    case ccl::DataType::kInt32:
      return all(int32_t{});
    case ccl::DataType::kInt64:
      return all(int64_t{});
    case ccl::DataType::kFloat16:
      return all(Half{});
    case ccl::DataType::kBfloat16:
      return all(Brain{});
    case ccl::DataType::kFloat32:
      return all(float{});
    case ccl::DataType::kFloat64:
      return all(double{});
    default:
      throw std::logic_error("not a real type");
  }
}

inline void referenceReduce(ccl::DataType type, ccl::ReduceOp op,
                            std::byte* out, const std::byte* a,
                            const std::byte* b, size_t num_bytes) {
  eachNumber(type, num_bytes, [&](size_t at, auto x) {
    auto y = x;
    std::memcpy(&x, a + at, sizeof(x));
    std::memcpy(&y, b + at, sizeof(y));
    if constexpr (std::is_class_v<decltype(x)>)
      x = x.from(combineNumbers(op, x.wide(), y.wide()));
    else
      x = combineNumbers(op, x, y);
    std::memcpy(out + at, &x, sizeof(x));
  });
}

inline void referenceDivide(ccl::DataType type, std::byte* data, int divisor,
                            size_t num_bytes) {
  eachNumber(type, num_bytes, [&](size_t at, auto x) {
    std::memcpy(&x, data + at, sizeof(x));
    if constexpr (std::is_class_v<decltype(x)>)
      x = x.from(divideNumber(x.wide(), divisor));
    else
      x = divideNumber(x, divisor);
    std::memcpy(data + at, &x, sizeof(x));
  });
}

}  // namespace mnemosyne::testing
