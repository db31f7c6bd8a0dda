#include "ccl/reduce_ops.h"

#include <bit>
#include <complex>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace mnemosyne::ccl {
namespace {

// Half-precision types are widened to float, combined, and rounded to the
// nearest, ties to even, after each operation.
struct Bfloat16 {
  uint16_t bits;
  static Bfloat16 from(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    if (value != value) return {static_cast<uint16_t>(wide >> 16 | 0x40)};
    return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
  }
  float wide() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

struct Float16 {
  uint16_t bits;

  float wide() const {
    const uint32_t sign = uint32_t{bits} << 16 & 0x80000000;
    const uint32_t exponent = bits >> 10 & 0x1f;
    const uint32_t mantissa = bits & 0x3ff;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
      const float value = static_cast<float>(mantissa) * 0x1p-24f;
      return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
    }
    // Infinity and NaN keep the largest exponent, others are re-biased by 127
    // - 15.
    const uint32_t biased = exponent == 0x1f ? 0xff : exponent + 112;
    return std::bit_cast<float>(sign | biased << 23 | mantissa << 13);
  }

  static Float16 from(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>(wide >> 16 & 0x8000);
    const uint32_t magnitude = wide & 0x7fffffff;
    if (magnitude > 0x7f800000)  // NaN: quiet, with what fits of its payload
      return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
    if (magnitude >= 0x47800000)  // 2^16 and more, infinity included
      return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {
      // Below 2^-14 the result is a multiple of 2^-24. Adding 0.5 puts that
      // unit at the last place of a float, so the adder does the rounding.
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      const uint32_t units = std::bit_cast<uint32_t>(shifted) - 0x3f000000;
      return {static_cast<uint16_t>(sign | units)};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13)};
  }
};

template <typename T>
constexpr bool kIsHalf =
    std::is_same_v<T, Float16> || std::is_same_v<T, Bfloat16>;
template <typename T>
constexpr bool kIsComplex = std::is_same_v<T, std::complex<float>> ||
                            std::is_same_v<T, std::complex<double>>;

// What one operation does to two values, with the type that it is done in.
struct Sum {
  template <typename T>
  static T apply(T a, T b) {
    if constexpr (std::is_same_v<T, bool>) {
      return a || b;
    } else if constexpr (std::is_integral_v<T>) {
      // Unsigned, because signed overflow is undefined; the bits are the same.
      return static_cast<T>(static_cast<uint64_t>(a) +
                            static_cast<uint64_t>(b));
    } else {
      return a + b;
    }
  }
};
struct Product {
  template <typename T>
  static T apply(T a, T b) {
    if constexpr (std::is_same_v<T, bool>) {
      return a && b;
    } else if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<uint64_t>(a) *
                            static_cast<uint64_t>(b));
    } else {
      return a * b;
    }
  }
};
// NaN wins, as in torch.
struct Min {
  template <typename T>
  static T apply(T a, T b) {
    return b < a || b != b ? b : a;
  }
};
struct Max {
  template <typename T>
  static T apply(T a, T b) {
    return a < b || b != b ? b : a;
  }
};
struct BitAnd {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct BitOr {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct BitXor {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

template <typename Op, typename T>
void loop(void* out, const void* a, const void* b, size_t num_bytes) {
  auto* to = static_cast<T*>(out);
  const auto* x = static_cast<const T*>(a);
  const auto* y = static_cast<const T*>(b);
  const size_t count = num_bytes / sizeof(T);
  for (size_t i = 0; i < count; ++i) {
    if constexpr (kIsHalf<T>) {
      to[i] = T::from(Op::apply(x[i].wide(), y[i].wide()));
    } else {
      to[i] = Op::template apply<T>(x[i], y[i]);
    }
  }
}

// Calls `use` with a value of the C++ type.
template <typename Use>
void withType(DataType type, Use&& use) {
  switch (type) {
    case DataType::kBool:
      return use(bool{});
    case DataType::kInt8:
      return use(int8_t{});
    case DataType::kUint8:
      return use(uint8_t{});
    case DataType::kInt16:
      return use(int16_t{});
    case DataType::kInt32:
      return use(int32_t{});
    case DataType::kInt64:
      return use(int64_t{});
    case DataType::kFloat16:
      return use(Float16{});
    case DataType::kBfloat16:
      return use(Bfloat16{});
    case DataType::kFloat32:
      return use(float{});
    case DataType::kFloat64:
      return use(double{});
    case DataType::kComplex64:
      return use(std::complex<float>{});
    case DataType::kComplex128:
      return use(std::complex<double>{});
    case DataType::kBytes:
      break;
  }
  throw std::logic_error("bytes cannot be reduced");
}

}  // namespace

size_t elementBytes(DataType type) {
  if (type == DataType::kBytes) return 1;
  size_t size = 0;
  withType(type, [&](auto value) { size = sizeof(value); });
  return size;
}

bool canReduce(DataType type, ReduceOp op) {
  if (type == DataType::kBytes) return false;
  const bool is_integer = type <= DataType::kInt64;
  const bool is_complex =
      type == DataType::kComplex64 || type == DataType::kComplex128;
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kProduct:
      return true;
    case ReduceOp::kAverage:
      return type != DataType::kBool;
    case ReduceOp::kMin:
    case ReduceOp::kMax:
      return !is_complex;
    case ReduceOp::kBitAnd:
    case ReduceOp::kBitOr:
    case ReduceOp::kBitXor:
      return is_integer;
  }
  return false;
}

void reduce(DataType type, ReduceOp op, void* out, const void* a, const void* b,
            size_t num_bytes) {
  withType(type, [&](auto value) {
    using T = decltype(value);
    switch (op) {
      case ReduceOp::kSum:
      case ReduceOp::kAverage:
        return loop<Sum, T>(out, a, b, num_bytes);
      case ReduceOp::kProduct:
        return loop<Product, T>(out, a, b, num_bytes);
      case ReduceOp::kMin:
        if constexpr (!kIsComplex<T>) loop<Min, T>(out, a, b, num_bytes);
        return;
      case ReduceOp::kMax:
        if constexpr (!kIsComplex<T>) loop<Max, T>(out, a, b, num_bytes);
        return;
      case ReduceOp::kBitAnd:
        if constexpr (std::is_integral_v<T>)
          loop<BitAnd, T>(out, a, b, num_bytes);
        return;
      case ReduceOp::kBitOr:
        if constexpr (std::is_integral_v<T>)
          loop<BitOr, T>(out, a, b, num_bytes);
        return;
      case ReduceOp::kBitXor:
        if constexpr (std::is_integral_v<T>)
          loop<BitXor, T>(out, a, b, num_bytes);
        return;
    }
  });
}

void divide(DataType type, void* data, int divisor, size_t num_bytes) {
  withType(type, [&](auto value) {
    using T = decltype(value);
    auto* values = static_cast<T*>(data);
    for (size_t i = 0; i < num_bytes / sizeof(T); ++i) {
      if constexpr (kIsHalf<T>) {
        values[i] = T::from(values[i].wide() / static_cast<float>(divisor));
      } else if constexpr (kIsComplex<T>) {
        values[i] /= static_cast<typename T::value_type>(divisor);
      } else if constexpr (!std::is_same_v<T, bool>) {
        if constexpr (std::is_integral_v<T>) {
          values[i] = static_cast<T>(static_cast<int64_t>(values[i]) / divisor);
        } else {
          values[i] /= static_cast<T>(divisor);
        }
      }
    }
  });
}

}  // namespace mnemosyne::ccl
