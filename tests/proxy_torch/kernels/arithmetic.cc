// Sums, products and what is made of them, element by element.
#include <cmath>

#include "elementwise.h"
#include "kernels.h"

namespace mnemosyne::torch_kernels {
namespace {

template <typename T>
struct Add {  // CUDAFunctor_add
  Wide<T> alpha;
  T operator()(T a, T b) const {
    return convert<T>(Wide<T>(a) + alpha * Wide<T>(b));
  }
};
template <typename T>
struct AddToSelf {  // CUDAFunctorOnSelf_add
  Wide<T> other, alpha;
  T operator()(T self) const {
    return convert<T>(Wide<T>(self) + alpha * other);
  }
};
template <typename T>
struct AddToOther {  // CUDAFunctorOnOther_add
  Wide<T> self, alpha;
  T operator()(T other) const {
    return convert<T>(self + alpha * Wide<T>(other));
  }
};

template <typename T>
struct Multiply {
  Wide<T> operator()(Wide<T> a, Wide<T> b) const { return a * b; }
};
template <typename T>
struct Divide {
  Wide<T> operator()(Wide<T> a, Wide<T> b) const { return a / b; }
};
template <typename T>
struct Maximum {
  Wide<T> operator()(Wide<T> a, Wide<T> b) const {
    return a != a || a > b ? a : b;
  }
};
template <typename T>
struct Minimum {
  Wide<T> operator()(Wide<T> a, Wide<T> b) const {
    return a != a || a < b ? a : b;
  }
};

struct And {
  bool operator()(bool a, bool b) const { return a && b; }
};
struct Or {
  bool operator()(bool a, bool b) const { return a || b; }
};

// BinaryFunctor, and with the first or the second argument a scalar.
template <typename T, typename Operation>
struct Binary {
  Operation operation;
  T operator()(T a, T b) const { return convert<T>(operation(a, b)); }
};
template <typename T, typename Operation>
struct WithFirst {
  Operation operation;
  Wide<T> a;
  T operator()(T b) const { return convert<T>(operation(a, b)); }
};
template <typename T, typename Operation>
struct WithSecond {
  Operation operation;
  Wide<T> b;
  T operator()(T a) const { return convert<T>(operation(a, b)); }
};

template <typename T, typename Operation>
void addBinary(RegisterKernel* add_to, const std::string& operation) {
  const auto name = [&](const char* functor) {
    return std::string(functor) + "I" + mangled<T>() + "*" + operation + "*";
  };
  addElementwise<Binary<T, Operation>>(add_to, name("NS0_13BinaryFunctor"));
  addElementwise<WithFirst<T, Operation>>(add_to, name("NS0_13AUnaryFunctor"));
  addElementwise<WithSecond<T, Operation>>(add_to, name("NS0_13BUnaryFunctor"));
}

template <typename T>
struct AddProduct {  // addcmul
  Wide<T> alpha;
  EndOfCaptures end;
  T operator()(T a, T b, T c) const {
    return convert<T>(Wide<T>(a) + alpha * Wide<T>(b) * Wide<T>(c));
  }
};
template <typename T>
struct AddQuotient {  // addcdiv
  Wide<T> alpha;
  EndOfCaptures end;
  T operator()(T a, T b, T c) const {
    return convert<T>(Wide<T>(a) + alpha * (Wide<T>(b) / Wide<T>(c)));
  }
};

template <typename T>
T interpolate(Wide<T> from, Wide<T> to, Wide<T> weight) {
  return convert<T>(std::abs(weight) < Wide<T>(0.5)
                        ? from + weight * (to - from)
                        : to - (to - from) * (1 - weight));
}
template <typename T>
struct Lerp {
  Wide<T> weight;
  EndOfCaptures end;
  T operator()(T from, T to) const { return interpolate<T>(from, to, weight); }
};
template <typename T>
struct LerpByTensor {
  T operator()(T from, T to, T weight) const {
    return interpolate<T>(from, to, weight);
  }
};

template <typename T>
void addFor(RegisterKernel* add_to) {
  const auto of = [](const char* functor) {
    return std::string(functor) + "I" + mangled<T>() + "EE";
  };
  addElementwise<Add<T>>(add_to, of("NS0_15CUDAFunctor_add"));
  addElementwise<AddToSelf<T>>(add_to, of("NS0_21CUDAFunctorOnSelf_add"));
  addElementwise<AddToOther<T>>(add_to, of("NS0_22CUDAFunctorOnOther_add"));
  addBinary<T, Multiply<T>>(add_to, "10MulFunctor");
}

}  // namespace

void addArithmetic(RegisterKernel* add_to) {
  addFor<int32_t>(add_to);
  addFor<int64_t>(add_to);
  addFor<double>(add_to);
  addBinary<int64_t, Minimum<int64_t>>(add_to, "19minimum_kernel_cuda");
  addBinary<double, Divide<double>>(add_to, "10DivFunctor");
  for (const char* name :
       {"10MulFunctor", "17BitwiseAndFunctor", "23logical_and_kernel_cuda"}) {
    addBinary<bool, And>(add_to, name);
  }
  for (const char* name : {"16BitwiseOrFunctor", "22logical_or_kernel_cuda"}) {
    addBinary<bool, Or>(add_to, name);
  }
  forFloating([&](auto number) {
    using T = decltype(number);
    addFor<T>(add_to);
    addBinary<T, Divide<T>>(add_to, "10DivFunctor");
    addBinary<T, Maximum<T>>(add_to, "19maximum_kernel_cuda");
    addBinary<T, Minimum<T>>(add_to, "19minimum_kernel_cuda");
    addElementwise<AddProduct<T>>(add_to,
                                  lambda<T, T, T>("19addcmul_cuda_kernel"));
    addElementwise<AddQuotient<T>>(add_to,
                                   lambda<T, T, T>("19addcdiv_cuda_kernel"));
    addElementwise<Lerp<T>>(add_to, lambda<T, T>("18lerp_scalar_kernel"));
    addElementwise<LerpByTensor<T>>(add_to,
                                    lambda<T, T, T>("18lerp_tensor_kernel"));
  });
}

}  // namespace mnemosyne::torch_kernels
