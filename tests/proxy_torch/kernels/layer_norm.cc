// Layer normalisation. Each row has its mean and the inverse of its deviation.
#include <cmath>
#include <string>
#include <vector>

#include "kernels.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

template <typename T>
float or1(const T* gamma, int64_t i) {
  return gamma == nullptr ? 1.0f : static_cast<float>(gamma[i]);
}

// One block for each row.
template <typename T>
void forward(const Launch& launch, int size, float epsilon, const T* x,
             const T* gamma, const T* beta, float* means, float* deviations,
             T* y) {
  for (int64_t row = 0; row < launch.grid.x; ++row, x += size, y += size) {
    float sum = 0, squares = 0;
    for (int i = 0; i < size; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(size);
    for (int i = 0; i < size; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse =
        1 / std::sqrt(squares / static_cast<float>(size) + epsilon);
    for (int i = 0; i < size; ++i) {
      const float shift = beta == nullptr ? 0 : static_cast<float>(beta[i]);
      y[i] = convert<T>(or1(gamma, i) * (inverse * (x[i] - mean)) + shift);
    }
    means[row] = mean;
    deviations[row] = inverse;
  }
}

template <typename T>
void backwardInput(const Launch& launch, const T* dy, const T* x,
                   const float* means, const float* inverses, const T* gamma,
                   T* dx, int size) {
  for (int64_t row = 0; row < launch.grid.x;
       ++row, x += size, dy += size, dx += size) {
    const float mean = means[row], inverse = inverses[row];
    float sum = 0, projection = 0;
    for (int i = 0; i < size; ++i) {
      const float gradient = dy[i] * or1(gamma, i);
      sum += gradient;
      projection += gradient * (x[i] - mean) * inverse;
    }
    for (int i = 0; i < size; ++i) {
      const float normal = (x[i] - mean) * inverse;
      const float rest = (sum + normal * projection) / static_cast<float>(size);
      dx[i] = convert<T>((dy[i] * or1(gamma, i) - rest) * inverse);
    }
  }
}

template <typename T>
void backwardWeights(const Launch&, int64_t num_rows, int64_t size, const T* dy,
                     const T* x, const float* means, const float* inverses,
                     T* dgamma, T* dbeta) {
  std::vector<float> gamma(size), beta(size);
  for (int64_t row = 0; row < num_rows; ++row, x += size, dy += size) {
    for (int64_t i = 0; i < size; ++i) {
      gamma[i] += dy[i] * (x[i] - means[row]) * inverses[row];
      beta[i] += dy[i];
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    if (dgamma != nullptr) dgamma[i] = convert<T>(gamma[i]);
    if (dbeta != nullptr) dbeta[i] = convert<T>(beta[i]);
  }
}

}  // namespace

void addLayerNorm(RegisterKernel* add_to) {
  forFloating([&](auto number) {
    using T = decltype(number);
    const auto add = [&](const std::string& name, const std::string& rest,
                         auto* kernel) {
      add_to(
          ("_ZN2at6native*" + name + "I" + mangled<T>() + "f" + rest).c_str(),
          kernel);
    };
    add("28vectorized_layer_norm_kernel", "Lb0EE*", onHost<forward<T>>);
    add("28vectorized_layer_norm_kernel", "EE*", onHost<forward<T>>);
    add("39layer_norm_grad_input_kernel_vectorized", "*",
        onHost<backwardInput<T>>);
    add("28layer_norm_grad_input_kernel", "*", onHost<backwardInput<T>>);
    // Not those that leave sums of some rows to another kernel.
    add("35GammaBetaBackwardCUDAKernelTemplate", "Lj*ELj*ELj*ELb0E*",
        onHost<backwardWeights<T>>);
    add("33GammaBetaBackwardSimpleCUDAKernel", "*", onHost<backwardWeights<T>>);
  });
}

}  // namespace mnemosyne::torch_kernels
