// Built several times: CMake gives each build its instruction set and
// MNEMOSYNE_KERNELS, the name of what it exports. What the processor may not
// run must not leak into the rest of the program, and the linker keeps one copy
// of an inline function, whichever it likes: so all here has internal linkage,
// and of std:: only types are used. A test looks at the object files.
#include "ccl/reduce_kernels.h"

#include <cstdint>
#include <type_traits>

#include "ccl/half.h"

namespace mnemosyne::ccl {
namespace {

struct Bool {
  uint8_t bits;  // anything but 0 is true

  using Many = Bool;
  template <typename Op>
  static Bool combine(Op op, Bool a, Bool b) {
    return {op(a.wide(), b.wide()) != 0};
  }
  uint8_t wide() const { return bits != 0; }
};

// Unsigned, because signed overflow is undefined; the bits are the same.
template <typename T>
using Unsigned = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// A compiler may swap the operands of + and *, and of two NaNs the processor
// takes the first. So where both are NaN `a` stands in for `b`. It could do so
// wherever `a` is NaN; but then AVX-512 loads `b` under a mask made of `a`, and
// each load waits for the other to arrive: less than half the speed from
// memory.
template <typename T>
T unlessBothNan(T a, T b) {
  return ((a == a) | (b == b)) ? b : a;
}

// What is done to two values: numbers, or vectors of them.
struct Sum {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Unsigned<T>>(a) +
                            static_cast<Unsigned<T>>(b));
    else
      return a + unlessBothNan(a, b);
  }
};
struct Product {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Unsigned<T>>(a) *
                            static_cast<Unsigned<T>>(b));
    else
      return a * unlessBothNan(a, b);
  }
};
// NaN wins, as in torch.
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    const T smaller = b < a ? b : a;
    return b == b ? smaller : b;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    const T larger = a < b ? b : a;
    return b == b ? larger : b;
  }
};
struct BitAnd {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct BitOr {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct BitXor {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct Quotient {
  int divisor;

  template <typename T>
  T operator()(T value, T) const {
    if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, double>)
      return value / divisor;
    else if constexpr (std::is_integral_v<T>)
      // Exact: a quotient that is no integer is at least 1 / divisor away from
      // one, and rounded by 2^-22 / divisor at most, as value <= 2^31.
      return static_cast<T>(static_cast<double>(value) / divisor);
    else
      return value / static_cast<float>(divisor);
  }
};

// Buffers start anywhere and hold any type.
template <typename T>
struct [[gnu::packed, gnu::may_alias]] Element {
  T value;
};

template <typename T>
constexpr bool kIsHalf =
    std::is_same_v<T, Float16> || std::is_same_v<T, Bfloat16>;

template <typename T, typename Op>
void loop(Op op, void* out, const void* a, const void* b, size_t num_bytes) {
  auto* to = static_cast<Element<T>*>(out);
  const auto* x = static_cast<const Element<T>*>(a);
  const auto* y = static_cast<const Element<T>*>(b);
  const size_t count = num_bytes / sizeof(T);
  size_t i = 0;
  if constexpr (kIsHalf<T>) {
    using Many = typename T::Many;
    if constexpr (!std::is_same_v<T, Many>) {
      const size_t done = num_bytes / sizeof(Many) * sizeof(Many);
      loop<Many>(op, out, a, b, done);
      i = done / sizeof(T);
    }
  }
  for (; i < count; ++i) {
    if constexpr (std::is_class_v<T>)
      to[i].value.bits =
          T::combine(op, T{x[i].value.bits}, T{y[i].value.bits}).bits;
    else
      to[i].value = op(T{x[i].value}, T{y[i].value});
  }
}

template <typename T>
void reduceLoop(ReduceOp op, void* out, const void* a, const void* b,
                size_t num_bytes) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAverage:
      return loop<T>(Sum(), out, a, b, num_bytes);
    case ReduceOp::kProduct:
      return loop<T>(Product(), out, a, b, num_bytes);
    case ReduceOp::kMin:
      return loop<T>(Min(), out, a, b, num_bytes);
    case ReduceOp::kMax:
      return loop<T>(Max(), out, a, b, num_bytes);
    default:
      break;
  }
  if constexpr (std::is_integral_v<T> || std::is_same_v<T, Bool>) {
    if (op == ReduceOp::kBitAnd) loop<T>(BitAnd(), out, a, b, num_bytes);
    if (op == ReduceOp::kBitOr) loop<T>(BitOr(), out, a, b, num_bytes);
    if (op == ReduceOp::kBitXor) loop<T>(BitXor(), out, a, b, num_bytes);
  }
}

// Calls `use` with a value of the C++ type.
template <typename Use>
void withType(DataType type, Use use) {
  switch (type) {
    case DataType::kBool:
      return use(Bool{});
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
    default:
      return;
  }
}

void reduceAny(DataType type, ReduceOp op, void* out, const void* a,
               const void* b, size_t num_bytes) {
  withType(type, [=](auto value) {
    reduceLoop<decltype(value)>(op, out, a, b, num_bytes);
  });
}

void divideAny(DataType type, void* data, int divisor, size_t num_bytes) {
  if (type == DataType::kBool) return;
  withType(type, [=](auto value) {
    loop<decltype(value)>(Quotient{divisor}, data, data, data, num_bytes);
  });
}

}  // namespace

const Kernels MNEMOSYNE_KERNELS = {reduceAny, divideAny};

}  // namespace mnemosyne::ccl
