// The negative log-likelihood of the targets.
#include <string>

#include "kernels.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

template <typename T>
void forward(const Launch& launch, T* loss, T* total_weight, const T* input,
             const int64_t* targets, const T* weights, bool is_mean,
             int64_t num_rows, int64_t num_columns, int64_t num_classes,
             int64_t ignored) {
  float sum = 0, total = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t target = targets[row];
    if (target == ignored) continue;
    if (target < 0 || target >= num_classes) {
      return launch.fail(proxy::kCudaAssert);
    }
    const float weight =
        weights == nullptr ? 1.0f : static_cast<float>(weights[target]);
    sum -= input[row * num_columns + target] * weight;
    total += weight;
  }
  *total_weight = convert<T>(total);
  *loss = convert<T>(is_mean ? sum / total : sum);
}

// Into gradients that begin with zeros.
template <typename T>
void backward(const Launch& launch, T* to, const T* gradient,
              const int64_t* targets, const T* weights, const T* total_weight,
              bool is_mean, int num_rows, int num_columns, int64_t num_classes,
              int64_t ignored) {
  const float scale =
      is_mean ? *gradient / *total_weight : static_cast<float>(*gradient);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t target = targets[row];
    if (target == ignored) continue;
    if (target < 0 || target >= num_classes) {
      return launch.fail(proxy::kCudaAssert);
    }
    const float weight =
        weights == nullptr ? 1.0f : static_cast<float>(weights[target]);
    to[row * num_columns + target] = convert<T>(-weight * scale);
  }
}

}  // namespace

void addLoss(RegisterKernel* add_to) {
  forFloating([&](auto number) {
    using T = decltype(number);
    const std::string type = mangled<T>();
    add_to(("_ZN*38nll_loss_forward_reduce_cuda_kernel_2dI" + type + "flE*")
               .c_str(),
           onHost<forward<T>>);
    add_to(("_ZN*39nll_loss_backward_reduce_cuda_kernel_2dI" + type + "lE*")
               .c_str(),
           onHost<backward<T>>);
  });
}

}  // namespace mnemosyne::torch_kernels
