// Kernels over lists of tensors (ATen/native/cuda/MultiTensorApply.cuh), the
// fused optimizers' among them.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "kernels.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

constexpr int64_t kChunk = 65536;
constexpr int kMaxBlocks = 2240;
constexpr int kMaxTensors[] = {770, 448, 336, 252, 210};

// TensorListMetadata
template <int depth>
struct Lists {
  char* addresses[depth][kMaxTensors[depth - 1]];
  int64_t counts[kMaxTensors[depth - 1]];
  uint16_t tensor_of[kMaxBlocks];
  int chunk_of[kMaxBlocks];
  int first_tensor;
};
// TensorListScalarListMetadata, of floats
template <int depth>
struct ListsAndScalars {
  static constexpr int max_tensors = depth == 1 ? 672 : kMaxTensors[depth - 1];
  char* addresses[depth][max_tensors];
  int64_t counts[max_tensors];
  float scalars[max_tensors];
  uint16_t tensor_of[kMaxBlocks];
  int chunk_of[kMaxBlocks];
};
// FusedOptimizerTensorListMetadata
template <int depth>
struct OptimizerLists {
  char* addresses[depth][kMaxTensors[depth - 1]];
  int64_t counts[kMaxTensors[depth - 1]];
  const float* steps[kMaxTensors[depth - 1]];
  uint16_t tensor_of[kMaxBlocks];
  int chunk_of[kMaxBlocks];
  int first_tensor;
};

struct Nothing {
  char nothing;
};

// Calls body(tensor, begin, end) for each block of the launch.
template <typename Metadata, typename Body>
void forEachChunk(const Launch& launch, const Metadata& lists, Body&& body) {
  for (uint32_t block = 0; block < launch.grid.x; ++block) {
    const int tensor = lists.tensor_of[block];
    const int64_t begin = lists.chunk_of[block] * kChunk;
    body(block, tensor, begin, std::min(begin + kChunk, lists.counts[tensor]));
  }
}

// The result is in the last list.
template <typename T, int depth, typename Operation>
void withScalar(const Launch& launch, const Lists<depth>& lists, Nothing,
                Operation operation, Wide<T> scalar) {
  forEachChunk(
      launch, lists, [&](uint32_t, int tensor, int64_t begin, int64_t end) {
        auto* in = reinterpret_cast<T*>(lists.addresses[0][tensor]);
        auto* out = reinterpret_cast<T*>(lists.addresses[depth - 1][tensor]);
        for (int64_t i = begin; i < end; ++i) {
          out[i] = convert<T>(operation(Wide<T>(in[i]), scalar));
        }
      });
}

template <typename T, int depth, typename Operation>
void withTensorScalar(const Launch& launch, const Lists<depth>& lists, Nothing,
                      Operation operation, const T* scalar, Wide<T> alpha) {
  withScalar<T, depth, Operation>(launch, lists, {}, operation,
                                  alpha * Wide<T>(*scalar));
}

template <typename T, int depth, typename Operation>
void withList(const Launch& launch, const Lists<depth>& lists, Nothing,
              Operation operation, Wide<T> alpha) {
  forEachChunk(
      launch, lists, [&](uint32_t, int tensor, int64_t begin, int64_t end) {
        auto* a = reinterpret_cast<T*>(lists.addresses[0][tensor]);
        auto* b = reinterpret_cast<T*>(lists.addresses[1][tensor]);
        auto* out = reinterpret_cast<T*>(lists.addresses[depth - 1][tensor]);
        for (int64_t i = begin; i < end; ++i) {
          out[i] = convert<T>(operation(Wide<T>(a[i]), alpha * Wide<T>(b[i])));
        }
      });
}

// The elements of one tensor in a list.
template <typename T, typename Metadata>
T* listed(const Metadata& lists, int list, int tensor) {
  return reinterpret_cast<T*>(lists.addresses[list][tensor]);
}

template <typename T, int depth, typename Operation>
void withScalars(const Launch& launch, const ListsAndScalars<depth>& lists,
                 Nothing, Operation operation) {
  forEachChunk(
      launch, lists, [&](uint32_t, int tensor, int64_t begin, int64_t end) {
        const T* in = listed<T>(lists, 0, tensor);
        T* out = listed<T>(lists, depth - 1, tensor);
        for (int64_t i = begin; i < end; ++i) {
          out[i] = convert<T>(operation(Wide<T>(in[i]), lists.scalars[tensor]));
        }
      });
}

template <typename T, int depth, typename Operation>
void unary(const Launch& launch, const Lists<depth>& lists, Nothing,
           Operation operation) {
  forEachChunk(launch, lists,
               [&](uint32_t, int tensor, int64_t begin, int64_t end) {
                 const T* in = listed<T>(lists, 0, tensor);
                 T* out = listed<T>(lists, depth - 1, tensor);
                 for (int64_t i = begin; i < end; ++i) {
                   out[i] = convert<T>(operation(Wide<T>(in[i])));
                 }
               });
}

// The sum of the first list and of the scalar times what is made of the others.
template <typename T, typename Metadata, typename Operation, typename Scalar>
void addPointwise(const Launch& launch, const Metadata& lists, int to,
                  Operation operation, Scalar&& scalar) {
  forEachChunk(
      launch, lists, [&](uint32_t, int tensor, int64_t begin, int64_t end) {
        const T* self = listed<T>(lists, 0, tensor);
        const T* a = listed<T>(lists, 1, tensor);
        const T* b = listed<T>(lists, 2, tensor);
        T* out = listed<T>(lists, to, tensor);
        for (int64_t i = begin; i < end; ++i) {
          out[i] = convert<T>(Wide<T>(self[i]) +
                              scalar(tensor) *
                                  operation(Wide<T>(a[i]), Wide<T>(b[i])));
        }
      });
}
template <typename T, int depth, typename Operation>
void pointwise(const Launch& launch, const Lists<depth>& lists, Nothing,
               Operation operation, Wide<T> scalar) {
  addPointwise<T>(launch, lists, depth == 3 ? 0 : 3, operation,
                  [&](int) { return scalar; });
}
template <typename T, int depth, typename Operation>
void pointwiseWithScalars(const Launch& launch,
                          const ListsAndScalars<depth>& lists, Nothing,
                          Operation operation) {
  addPointwise<T>(launch, lists, depth == 3 ? 0 : 3, operation,
                  [&](int tensor) { return lists.scalars[tensor]; });
}

template <typename T, int depth>
void lerp(const Launch& launch, const Lists<depth>& lists, Nothing, Nothing,
          Wide<T> weight) {
  forEachChunk(launch, lists,
               [&](uint32_t, int tensor, int64_t begin, int64_t end) {
                 const T* from = listed<T>(lists, 0, tensor);
                 const T* to = listed<T>(lists, 1, tensor);
                 T* out = listed<T>(lists, depth == 2 ? 0 : 2, tensor);
                 for (int64_t i = begin; i < end; ++i) {
                   const Wide<T> a = from[i], b = to[i];
                   out[i] = convert<T>(std::abs(weight) < Wide<T>(0.5)
                                           ? a + weight * (b - a)
                                           : b - (b - a) * (1 - weight));
                 }
               });
}

struct SquareRoot {
  char nothing;
  float operator()(float value) const { return std::sqrt(value); }
};

// LpNormFunctor for the norm of order two: the squares of each chunk.
template <typename T>
void sumSquares(const Launch& launch, const Lists<1>& lists, Nothing,
                float* sums, int most_chunks) {
  forEachChunk(launch, lists,
               [&](uint32_t block, int tensor, int64_t begin, int64_t end) {
                 const auto* in =
                     reinterpret_cast<const T*>(lists.addresses[0][tensor]);
                 float sum = 0;
                 for (int64_t i = begin; i < end; ++i) {
                   const float value = in[i];
                   sum += value * value;
                 }
                 sums[(lists.first_tensor + tensor) * most_chunks +
                      lists.chunk_of[block]] = sum;
               });
}

struct Addresses {  // TensorListAddresses
  char* addresses[3200];
};
template <typename T>
void finishNorms(const Launch& launch, const float* sums, const Addresses& to,
                 int most_chunks) {
  for (uint32_t tensor = 0; tensor < launch.grid.x; ++tensor) {
    float sum = 0;
    for (int i = 0; i < most_chunks; ++i) sum += sums[tensor * most_chunks + i];
    *reinterpret_cast<T*>(to.addresses[tensor]) = convert<T>(std::sqrt(sum));
  }
}

// Parameters, gradients, and both moments.
template <typename T, bool is_adamw>
void adam(const Launch& launch, const OptimizerLists<4>& lists, Nothing,
          const float* rate_of_tensor, double rate_of_host, double beta1_,
          double beta2_, double decay_, double epsilon_, bool maximizes,
          const float* scale, const float* found_inf) {
  if (found_inf != nullptr && *found_inf == 1) return;
  const auto rate = rate_of_tensor == nullptr ? static_cast<float>(rate_of_host)
                                              : *rate_of_tensor;
  const auto beta1 = static_cast<float>(beta1_);
  const auto beta2 = static_cast<float>(beta2_);
  const auto decay = static_cast<float>(decay_);
  const auto epsilon = static_cast<float>(epsilon_);
  forEachChunk(launch, lists,
               [&](uint32_t, int tensor, int64_t begin, int64_t end) {
                 const auto list = [&](int i) {
                   return reinterpret_cast<T*>(lists.addresses[i][tensor]);
                 };
                 T *parameters = list(0), *gradients = list(1),
                   *means = list(2), *squares = list(3);
                 const float step = *lists.steps[tensor];
                 const float step_size = rate / (1 - std::pow(beta1, step));
                 const float correction = std::sqrt(1 - std::pow(beta2, step));
                 for (int64_t i = begin; i < end; ++i) {
                   float parameter = parameters[i];
                   float gradient = gradients[i];
                   if (scale != nullptr) {
                     gradient /= *scale;
                     gradients[i] = convert<T>(gradient);
                   }
                   if (maximizes) gradient = -gradient;
                   if (is_adamw) {
                     parameter -= rate * decay * parameter;
                   } else {
                     gradient += parameter * decay;
                   }
                   const float mean = beta1 * means[i] + (1 - beta1) * gradient;
                   const float mean_square =
                       beta2 * squares[i] + (1 - beta2) * gradient * gradient;
                   parameter -= step_size * mean /
                                (std::sqrt(mean_square) / correction + epsilon);
                   parameters[i] = convert<T>(parameter);
                   means[i] = convert<T>(mean);
                   squares[i] = convert<T>(mean_square);
                 }
               });
}

template <typename T>
void addFor(RegisterKernel* add_to) {
  const std::string type = mangled<T>();
  const auto add = [&](const std::string& pattern, auto* kernel) {
    add_to(("_ZN2at6native*" + pattern).c_str(), kernel);
  };
  const auto addOperation = [&](auto operation, const std::string& name) {
    using Operation = decltype(operation);
    add("21BinaryOpScalarFunctorI" + type + "Li1E*" + name + "*",
        onHost<withScalar<T, 1, Operation>>);
    add("21BinaryOpScalarFunctorI" + type + "Li2E*" + name + "*",
        onHost<withScalar<T, 2, Operation>>);
    add("27BinaryOpScalarTensorFunctorI" + type + "Li1E*" + name + "*",
        onHost<withTensorScalar<T, 1, Operation>>);
    add("27BinaryOpScalarTensorFunctorI" + type + "Li2E*" + name + "*",
        onHost<withTensorScalar<T, 2, Operation>>);
    add("24BinaryOpListAlphaFunctorI" + type + "Li2E*" + name + "*",
        onHost<withList<T, 2, Operation>>);
    add("24BinaryOpListAlphaFunctorI" + type + "Li3E*" + name + "*",
        onHost<withList<T, 3, Operation>>);
    add("25BinaryOpScalarListFunctorI" + type + "Li1E*" + name + "*",
        onHost<withScalars<T, 1, Operation>>);
    add("25BinaryOpScalarListFunctorI" + type + "Li2E*" + name + "*",
        onHost<withScalars<T, 2, Operation>>);
    add("24PointwiseOpScalarFunctorI" + type + "Li3E*" + name + "*",
        onHost<pointwise<T, 3, Operation>>);
    add("24PointwiseOpScalarFunctorI" + type + "Li4E*" + name + "*",
        onHost<pointwise<T, 4, Operation>>);
    add("28PointwiseOpScalarListFunctorI" + type + "Li3E*" + name + "*",
        onHost<pointwiseWithScalars<T, 3, Operation>>);
    add("28PointwiseOpScalarListFunctorI" + type + "Li4E*" + name + "*",
        onHost<pointwiseWithScalars<T, 4, Operation>>);
  };
  addOperation(std::plus<Wide<T>>(), "St4plus");
  addOperation(std::minus<Wide<T>>(), "St5minus");
  addOperation(std::multiplies<Wide<T>>(), "St10multiplies");
  addOperation(std::divides<Wide<T>>(), "St7divides");
  add("14UnaryOpFunctorI" + type + "Li1E*4SqrtI*",
      onHost<unary<T, 1, SquareRoot>>);
  add("14UnaryOpFunctorI" + type + "Li2E*4SqrtI*",
      onHost<unary<T, 2, SquareRoot>>);
  add("22TernaryOpScalarFunctorI" + type + "Li2E*11LerpFunctor*",
      onHost<lerp<T, 2>>);
  add("22TernaryOpScalarFunctorI" + type + "Li3E*11LerpFunctor*",
      onHost<lerp<T, 3>>);
  add("13LpNormFunctorI" + type + "LNS0_8NormTypeE2E*", onHost<sumSquares<T>>);
  add("14lpnorm_cleanupI" + type + "LNS0_8NormTypeE2E*Lb1E*",
      onHost<finishNorms<T>>);
  add("20FusedAdamMathFunctorI" + type + "Li4ELNS0_9ADAM_MODEE0ELb0E*",
      onHost<adam<T, false>>);
  add("20FusedAdamMathFunctorI" + type + "Li4ELNS0_9ADAM_MODEE1ELb0E*",
      onHost<adam<T, true>>);
}

}  // namespace

void addForeach(RegisterKernel* add_to) {
  forFloating([&](auto number) { addFor<decltype(number)>(add_to); });
}

}  // namespace mnemosyne::torch_kernels
