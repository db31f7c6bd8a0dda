// Softmax and its logarithm, over rows that lie in order.
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

// softmax_warp_forward, of rows up to 2048; backward up to 1024.
template <typename In, typename Out, bool is_log>
void forward(const Launch&, Out* to, const In* from, int num_rows, int stride,
             int size, const bool*, int, bool) {
  for (int row = 0; row < num_rows; ++row, to += stride, from += stride) {
    float most = from[0];
    for (int i = 1; i < size; ++i) most = std::max<float>(most, from[i]);
    float sum = 0;
    for (int i = 0; i < size; ++i) sum += std::exp(from[i] - most);
    const float log = std::log(sum);
    for (int i = 0; i < size; ++i) {
      to[i] = convert<Out>(is_log ? from[i] - most - log
                                  : std::exp(from[i] - most) / sum);
    }
  }
}

// Its gradient comes multiplied by the output, if there is no logarithm.
template <typename In, typename Out, bool is_log>
void backward(const Launch&, Out* to, const In* gradient, const In* y,
              int num_rows, int stride, int size, const bool*) {
  for (int row = 0; row < num_rows;
       ++row, to += stride, gradient += stride, y += stride) {
    float sum = 0;
    for (int i = 0; i < size; ++i) sum += gradient[i];
    for (int i = 0; i < size; ++i) {
      to[i] = convert<Out>(
          gradient[i] -
          (is_log ? std::exp(static_cast<float>(y[i])) : float{y[i]}) * sum);
    }
  }
}

template <typename In, typename Out, bool is_log>
void addFor(RegisterKernel* add_to, const std::string& types) {
  const auto add = [&](const std::string& pattern, auto* kernel) {
    add_to(("_ZN*" + pattern).c_str(), kernel);
  };
  const std::string warp = types + "Li*ELb" + (is_log ? "1" : "0") + "ELb0E*";
  add("20softmax_warp_forwardI" + warp, onHost<forward<In, Out, is_log>>);
  add("21softmax_warp_backwardI" + warp, onHost<backward<In, Out, is_log>>);
}

}  // namespace

void addSoftmax(RegisterKernel* add_to) {
  const auto add = [&]<typename In, typename Out>(const std::string& types) {
    addFor<In, Out, false>(add_to, types);
    addFor<In, Out, true>(add_to, types);
  };
  add.template operator()<float, float>("fff");
  add.template operator()<Bfloat16, Bfloat16>("N3c108BFloat16ES*_f");
  add.template operator()<Bfloat16, float>("N3c108BFloat16Eff");
  add.template operator()<float, Bfloat16>("fN3c108BFloat16Ef");
}

}  // namespace mnemosyne::torch_kernels
