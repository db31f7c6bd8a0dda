// Functions of one number, and their derivatives.
#include <cmath>
#include <numbers>

#include "elementwise.h"
#include "kernels.h"

namespace mnemosyne::torch_kernels {
namespace {

template <typename T, auto function>
struct Unary {
  T operator()(T x) const {
    return convert<T>(function(static_cast<float>(x)));
  }
};
template <typename T, auto function>
struct Backward {
  T operator()(T gradient, T x) const {
    return convert<T>(
        function(static_cast<float>(gradient), static_cast<float>(x)));
  }
};

float roundUp(float x) { return std::ceil(x); }
float negate(float x) { return -x; }
float absolute(float x) { return std::abs(x); }
float reciprocal(float x) { return 1 / x; }
float exponential(float x) { return std::exp(x); }
float logarithm(float x) { return std::log(x); }
float squareRoot(float x) { return std::sqrt(x); }
float inverseRoot(float x) { return 1 / std::sqrt(x); }
float sine(float x) { return std::sin(x); }
float cosine(float x) { return std::cos(x); }
float hyperbolicTangent(float x) { return std::tanh(x); }
float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
float silu(float x) { return x * sigmoid(x); }
float siluBackward(float gradient, float x) {
  const float s = sigmoid(x);
  return gradient * s * (1 + x * (1 - s));
}
float sigmoidBackward(float gradient, float y) {
  return gradient * (1 - y) * y;
}
float tanhBackward(float gradient, float y) { return gradient * (1 - y * y); }

struct RootOfDouble {
  double operator()(double x) const { return std::sqrt(x); }
};
struct ReciprocalOfDouble {
  double operator()(double x) const { return 1 / x; }
};
struct AbsoluteDouble {
  double operator()(double x) const { return std::abs(x); }
};

constexpr float kRootHalf = std::numbers::sqrt2_v<float> / 2;
constexpr float kRootTwoOverPi =
    std::numbers::sqrt2_v<float> * std::numbers::inv_sqrtpi_v<float>;
constexpr float kCubic = 0.044715f;

float gelu(float x) { return 0.5f * x * (1 + std::erf(x * kRootHalf)); }
float geluBackward(float gradient, float x) {
  const float cdf = 0.5f * (1 + std::erf(x * kRootHalf));
  const float pdf = 0.5f * kRootTwoOverPi * std::exp(-0.5f * x * x);
  return gradient * (cdf + x * pdf);
}
float geluByTanh(float x) {
  return 0.5f * x * (1 + std::tanh(kRootTwoOverPi * (x + kCubic * x * x * x)));
}
float geluByTanhBackward(float gradient, float x) {
  const float t = std::tanh(kRootTwoOverPi * (x + kCubic * x * x * x));
  const float slope = (1 - t * t) * kRootTwoOverPi * (1 + 3 * kCubic * x * x);
  return gradient * (0.5f * (1 + t) + 0.5f * x * slope);
}

template <typename T, int exponent>
struct FixedPower {
  EndOfCaptures end;
  T operator()(T x) const {
    Wide<T> power = x;
    for (int i = 1; i < exponent; ++i) power *= static_cast<Wide<T>>(x);
    return convert<T>(power);
  }
};
template <typename T>
struct Power {  // the general case of pow_tensor_scalar_kernel_impl
  T exponent;
  EndOfCaptures end;
  T operator()(T base) const {
    return convert<T>(
        std::pow(static_cast<Wide<T>>(base), static_cast<Wide<T>>(exponent)));
  }
};
template <typename T>
struct PowerByTensor {
  EndOfCaptures end;
  T operator()(T base, T exponent) const {
    return convert<T>(
        std::pow(static_cast<float>(base), static_cast<float>(exponent)));
  }
};
template <typename T>
struct Threshold {
  Wide<T> threshold, value;
  EndOfCaptures end;
  T operator()(T x, T other) const {
    return Wide<T>(x) <= threshold ? convert<T>(value) : other;
  }
};

template <typename T>
void addPowers(RegisterKernel* add_to) {
  const std::string power = std::string("Z*29pow_tensor_scalar_kernel_implI") +
                            mangled<T>() + "*EUl*E";
  addElementwise<FixedPower<T, 2>>(add_to, power + "_");
  addElementwise<FixedPower<T, 3>>(add_to, power + "0_");
  addElementwise<Power<T>>(add_to, power + "2_");
}

template <typename T>
void addFor(RegisterKernel* add_to) {
  addPowers<T>(add_to);
  const auto unary = [&]<auto function>(const char* in,
                                        const char* suffix = "E_") {
    addElementwise<Unary<T, function>>(add_to, lambda<T>(in, suffix));
  };
  const auto backward = [&]<auto function>(const char* in) {
    addElementwise<Backward<T, function>>(add_to, lambda<T, T>(in));
  };
  unary.template operator()<negate>("15neg_kernel_cuda");
  unary.template operator()<roundUp>("16ceil_kernel_cuda");
  unary.template operator()<reciprocal>("22reciprocal_kernel_cuda");
  unary.template operator()<exponential>("15exp_kernel_cuda");
  unary.template operator()<logarithm>("15log_kernel_cuda");
  unary.template operator()<squareRoot>("16sqrt_kernel_cuda");
  unary.template operator()<inverseRoot>("17rsqrt_kernel_cuda");
  unary.template operator()<sine>("15sin_kernel_cuda");
  unary.template operator()<cosine>("15cos_kernel_cuda");
  unary.template operator()<hyperbolicTangent>("16tanh_kernel_cuda");
  unary.template operator()<sigmoid>("19sigmoid_kernel_cuda");
  unary.template operator()<silu>("11silu_kernel");
  addElementwise<Unary<T, absolute>>(
      add_to, std::string("NS0_10AbsFunctorI") + mangled<T>() + "EE");
  backward.template operator()<siluBackward>("20silu_backward_kernel");
  backward.template operator()<sigmoidBackward>(
      "28sigmoid_backward_kernel_cuda");
  backward.template operator()<tanhBackward>("25tanh_backward_kernel_cuda");
  // The first lambda of each is for the approximation by tanh.
  unary.template operator()<geluByTanh>(
      "18GeluCUDAKernelImpl*GeluTypeEENKUlvE_cl");
  unary.template operator()<gelu>("18GeluCUDAKernelImpl*GeluTypeEENKUlvE0_cl");
  backward.template operator()<geluByTanhBackward>(
      "26GeluBackwardCUDAKernelImpl*GeluTypeEENKUlvE_cl");
  backward.template operator()<geluBackward>(
      "26GeluBackwardCUDAKernelImpl*GeluTypeEENKUlvE0_cl");
  addElementwise<PowerByTensor<T>>(add_to,
                                   lambda<T, T>("24pow_tensor_tensor_kernel"));
  addElementwise<Threshold<T>>(add_to, lambda<T, T>("21threshold_kernel_impl"));
}

}  // namespace

void addUnary(RegisterKernel* add_to) {
  forFloating([&](auto number) { addFor<decltype(number)>(add_to); });
  // For norms, which DeepSpeed sums up in doubles.
  addPowers<double>(add_to);
  addElementwise<RootOfDouble>(add_to, lambda<double>("16sqrt_kernel_cuda"));
  addElementwise<ReciprocalOfDouble>(
      add_to, lambda<double>("22reciprocal_kernel_cuda"));
  addElementwise<AbsoluteDouble>(add_to, "NS0_10AbsFunctorIdEE");
}

}  // namespace mnemosyne::torch_kernels
