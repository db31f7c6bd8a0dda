#include "proxy/emulated/reduce.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "proxy/emulated/numbers.h"

namespace mnemosyne::proxy::emulated {
namespace {

template <typename Body>
bool withType(int type, Body&& body) {
  switch (type) {
    case 0:
      body(int8_t());
      return true;
    case 1:
      body(uint8_t());
      return true;
    case 2:
      body(int32_t());
      return true;
    case 3:
      body(uint32_t());
      return true;
    case 4:
      body(int64_t());
      return true;
    case 5:
      body(uint64_t());
      return true;
    case 6:
      body(Float16());
      return true;
    case 7:
      body(float());
      return true;
    case 8:
      body(double());
      return true;
    case 9:
      body(Bfloat16());
      return true;
    default:
      return false;
  }
}

// What elements are computed in: halves in float, integers without a sign, in
// which overflow wraps around.
template <typename T, bool = std::is_integral_v<T>>
struct WideOf {
  using type = std::conditional_t<std::is_same_v<T, double>, double, float>;
};
template <typename T>
struct WideOf<T, true> {
  using type = std::make_unsigned_t<T>;
};
template <typename T>
using Wide = typename WideOf<T>::type;

template <typename T>
T minimum(T a, T b) {
  if constexpr (std::is_integral_v<T>) return b < a ? b : a;
  return std::fmin(a, b);
}

template <typename T>
T maximum(T a, T b) {
  if constexpr (std::is_integral_v<T>) return a < b ? b : a;
  return std::fmax(a, b);
}

template <typename T, typename Op>
void reduceBy(const std::vector<const std::byte*>& inputs, std::byte* to,
              size_t count, Op&& op, bool is_average) {
  for (size_t i = 0; i < count; ++i) {
    const auto at = [&](size_t rank) {
      return static_cast<Wide<T>>(reinterpret_cast<const T*>(inputs[rank])[i]);
    };
    Wide<T> value = at(0);
    for (size_t rank = 1; rank < inputs.size(); ++rank) {
      value = op(value, at(rank));
    }
    if (is_average) {
      if constexpr (std::is_integral_v<T>) {
        value = static_cast<Wide<T>>(static_cast<T>(value) /
                                     static_cast<T>(inputs.size()));
      } else {
        value /= static_cast<Wide<T>>(inputs.size());
      }
    }
    reinterpret_cast<T*>(to)[i] = static_cast<T>(value);
  }
}

}  // namespace

size_t ncclTypeBytes(int type) {
  if (type == 10 || type == 11) return 1;  // 8-bit floats
  size_t size = 0;
  withType(type, [&](auto value) { size = sizeof value; });
  return size;
}

bool isReducible(int type) {
  return withType(type, [](auto) {});
}

void reduce(int type, int op, const std::vector<const std::byte*>& inputs,
            std::byte* to, size_t count) {
  withType(type, [&](auto value) {
    using T = decltype(value);
    using W = Wide<T>;
    // Integers are compared as what they are.
    using Compared = std::conditional_t<std::is_integral_v<T>, T, W>;
    switch (op) {
      case kProduct:
        return reduceBy<T>(
            inputs, to, count, [](W a, W b) { return static_cast<W>(a * b); },
            false);
      case kMaximum:
        return reduceBy<T>(
            inputs, to, count,
            [](W a, W b) {
              return static_cast<W>(maximum<Compared>(
                  static_cast<Compared>(a), static_cast<Compared>(b)));
            },
            false);
      case kMinimum:
        return reduceBy<T>(
            inputs, to, count,
            [](W a, W b) {
              return static_cast<W>(minimum<Compared>(
                  static_cast<Compared>(a), static_cast<Compared>(b)));
            },
            false);
      default:
        return reduceBy<T>(
            inputs, to, count, [](W a, W b) { return static_cast<W>(a + b); },
            op == kAverage);
    }
  });
}

void scale(int type, const std::byte* factor, const std::byte* from,
           std::byte* to, size_t count) {
  withType(type, [&](auto value) {
    using T = decltype(value);
    const auto by = static_cast<Wide<T>>(*reinterpret_cast<const T*>(factor));
    for (size_t i = 0; i < count; ++i) {
      const auto element =
          static_cast<Wide<T>>(reinterpret_cast<const T*>(from)[i]);
      reinterpret_cast<T*>(to)[i] =
          static_cast<T>(static_cast<Wide<T>>(element * by));
    }
  });
}

}  // namespace mnemosyne::proxy::emulated
