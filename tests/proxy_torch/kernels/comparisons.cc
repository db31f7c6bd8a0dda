// Comparisons, and choices by their results.
#include <algorithm>
#include <cmath>
#include <limits>

#include "elementwise.h"
#include "kernels.h"

namespace mnemosyne::torch_kernels {
namespace {

template <typename T>
struct Equals {  // CompareEqFunctor
  int is_not;
  bool operator()(Wide<T> a, Wide<T> b) const { return (a == b) != is_not; }
};
template <typename T>
struct Compares {  // CompareFunctor
  int operation;
  bool operator()(Wide<T> a, Wide<T> b) const {
    switch (operation) {
      case 0:
        return a >= b;
      case 1:
        return a > b;
      case 2:
        return a <= b;
      default:
        return a < b;
    }
  }
};

template <typename T, typename Comparison>
struct Both {
  Comparison comparison;
  bool operator()(T a, T b) const { return comparison(a, b); }
};
template <typename T, typename Comparison>
struct WithFirst {
  Comparison comparison;
  Wide<T> a;
  bool operator()(T b) const { return comparison(a, b); }
};
template <typename T, typename Comparison>
struct WithSecond {
  Comparison comparison;
  Wide<T> b;
  bool operator()(T a) const { return comparison(a, b); }
};
template <typename T>
struct WithScalar {  // the lambda of compare_scalar_kernel keeps T itself
  Compares<T> comparison;
  T b;
  EndOfCaptures end;
  bool operator()(T a) const { return comparison(a, b); }
};

template <typename T>
struct Not {
  bool operator()(T value) const { return !static_cast<bool>(value); }
};
template <typename T>
struct IsPositiveInfinite {
  bool operator()(T value) const {
    return value == std::numeric_limits<float>::infinity();
  }
};
template <typename T>
struct IsNegativeInfinite {
  bool operator()(T value) const {
    return value == -std::numeric_limits<float>::infinity();
  }
};

// The values are opaque to the kernel: an integer of their size.
template <typename T>
struct Where {
  EndOfCaptures end;
  T operator()(bool condition, T yes, T no) const {
    return condition ? yes : no;
  }
};
template <typename T>
struct MaskedFill {
  T value;
  EndOfCaptures end;
  T operator()(T self, bool mask) const { return mask ? value : self; }
};

template <typename T>
struct Clamp {  // launch_clamp_scalar
  int limits;   // lower, upper, both
  Wide<T> first, second;
  EndOfCaptures end;
  T operator()(T value) const {
    const Wide<T> wide = value;
    if (wide != wide) return value;
    if (limits == 0) return convert<T>(std::max(wide, first));
    if (limits == 1) return convert<T>(std::min(wide, first));
    return convert<T>(std::min(std::max(wide, first), second));
  }
};

template <typename T>
void addFor(RegisterKernel* add_to) {
  const std::string type = mangled<T>();
  const auto equal = [&](const char* functor) {
    return std::string(functor) + "I" + type + "*16CompareEqFunctor*";
  };
  addElementwise<Both<T, Equals<T>>>(add_to, equal("NS0_13BinaryFunctor"));
  addElementwise<WithFirst<T, Equals<T>>>(add_to, equal("NS0_13AUnaryFunctor"));
  addElementwise<WithSecond<T, Equals<T>>>(add_to,
                                           equal("NS0_13BUnaryFunctor"));
  addElementwise<Both<T, Compares<T>>>(add_to,
                                       "NS0_*14CompareFunctorI" + type + "EE");
  addElementwise<WithScalar<T>>(add_to,
                                "ZNS0_21compare_scalar_kernelI" + type + "*_");
  addElementwise<Not<T>>(add_to, lambda<T>("23logical_not_kernel_cuda"));
  addElementwise<MaskedFill<T>>(add_to,
                                lambda<T, bool>("18masked_fill_kernel"));
}

}  // namespace

void addComparisons(RegisterKernel* add_to) {
  addFor<int32_t>(add_to);
  addFor<int64_t>(add_to);
  addFor<double>(add_to);
  addElementwise<Not<bool>>(add_to, lambda<bool>("23logical_not_kernel_cuda"));
  addElementwise<Not<bool>>(add_to, lambda<bool>("23bitwise_not_kernel_cuda"));
  addElementwise<Clamp<int32_t>>(add_to,
                                 lambda<int32_t>("19launch_clamp_scalar"));
  addElementwise<Clamp<double>>(add_to,
                                lambda<double>("19launch_clamp_scalar"));
  addElementwise<Clamp<int64_t>>(add_to,
                                 lambda<int64_t>("19launch_clamp_scalar"));
  addElementwise<Where<uint32_t>>(add_to, "Z*17where_kernel_impl*EUlbjjE_");
  addElementwise<Where<uint16_t>>(add_to, "Z*17where_kernel_impl*EUlbttE_");
  addElementwise<Where<uint64_t>>(add_to, "Z*17where_kernel_impl*EUlbmmE_");
  forFloating([&](auto number) {
    using T = decltype(number);
    addFor<T>(add_to);
    addElementwise<IsPositiveInfinite<T>>(add_to,
                                          lambda<T>("20isposinf_kernel_impl"));
    addElementwise<IsNegativeInfinite<T>>(add_to,
                                          lambda<T>("20isneginf_kernel_impl"));
    addElementwise<Clamp<T>>(add_to, lambda<T>("19launch_clamp_scalar"));
  });
}

}  // namespace mnemosyne::torch_kernels
