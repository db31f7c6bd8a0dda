// Reductions over dimensions of a tensor (ATen/native/cuda/Reduce.cuh). The
// order of the elements is that of their indices, whatever the launch asks for.
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels.h"
#include "offsets.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

// The operation of each, as it lies in the parameters: reduce() takes in an
// element, project() makes the result.
template <typename T>
struct Sum {
  char nothing;
  static Wide<T> first() { return 0; }
  Wide<T> reduce(Wide<T> sum, T value) const { return sum + value; }
  Wide<T> project(Wide<T> sum) const { return sum; }
};
template <typename T>
struct Mean {
  Wide<T> factor;
  static Wide<T> first() { return 0; }
  Wide<T> reduce(Wide<T> sum, T value) const { return sum + value; }
  Wide<T> project(Wide<T> sum) const { return sum * factor; }
};
template <typename T>
struct NormTwo {
  char nothing;
  static Wide<T> first() { return 0; }
  Wide<T> reduce(Wide<T> sum, T value) const {
    return sum + static_cast<Wide<T>>(value) * static_cast<Wide<T>>(value);
  }
  Wide<T> project(Wide<T> sum) const { return std::sqrt(sum); }
};
template <typename T>
struct NormOne {
  char nothing;
  static Wide<T> first() { return 0; }
  Wide<T> reduce(Wide<T> sum, T value) const {
    return sum + std::abs(static_cast<Wide<T>>(value));
  }
  Wide<T> project(Wide<T> sum) const { return sum; }
};
template <typename T, bool is_max>
struct Extreme {  // accumulates in T itself
  char nothing;
  static T first() { return T(); }
  T reduce(T most, T value) const {
    const bool is_kept = most != most || (is_max ? most > value : most < value);
    return is_kept ? most : value;
  }
  T project(T most) const { return most; }
};
struct SumOfIntegers {
  char nothing;
  static int64_t first() { return 0; }
  int64_t reduce(int64_t sum, int64_t value) const { return sum + value; }
  int64_t project(int64_t sum) const { return sum; }
};
struct All {
  char nothing;
  static bool first() { return true; }
  bool reduce(bool all, bool value) const { return all && value; }
  bool project(bool all) const { return all; }
};
struct Any {
  char nothing;
  static bool first() { return false; }
  bool reduce(bool any, bool value) const { return any || value; }
  bool project(bool any) const { return any; }
};

// The value and its index: the first of equal ones, and the first NaN.
struct Place {
  float value;
  int64_t index;
};
template <bool is_max>
struct PlaceOfExtreme {  // MaxOps, MinOps
  char nothing;
  static Place first() { return {}; }
  Place reduce(const Place& most, float value, int64_t index) const {
    const bool is_number = most.value == most.value;
    const bool is_better = is_max ? value > most.value : value < most.value;
    return is_number && (value != value || is_better) ? Place{value, index}
                                                      : most;
  }
};

struct Config {  // ReduceConfig
  int element_bytes, num_inputs, num_outputs, step_input, step_output;
  int ctas_per_output, input_mult[3], output_mult[2];
  int block_width, block_height, num_threads;
  bool vectorize_input;
  int output_vec_size;
};

template <typename Operation>
using Accumulator = decltype(Operation::first());

template <typename Operation>
struct Reduction {  // ReduceOp
  Operation operation;
  Accumulator<Operation> identity;
  Config config;
  Offsets<1> inputs;
  Offsets<2> outputs;
  const char* from;
  char* to[2];
  void *accumulated, *of_blocks;
  int* semaphores;
  int64_t base_index;
  bool accumulates, is_final;
  int num_outputs;
};

template <typename In, typename Out, typename Operation>
void reduce(const Launch& launch, const Reduction<Operation>& by) {
  // Tensors beyond 32-bit offsets come in parts.
  if (by.accumulates || !by.is_final) {
    return launch.fail(proxy::kCudaNotSupported);
  }
  by.outputs.forEach(by.config.num_outputs, [&](const auto& output) {
    auto value = by.identity;
    by.inputs.forEach(by.config.num_inputs, [&](const auto& input) {
      value = by.operation.reduce(
          value, *reinterpret_cast<const In*>(by.from + output[1] + input[0]));
    });
    *reinterpret_cast<Out*>(by.to[0] + output[0]) =
        convert<Out>(by.operation.project(value));
  });
}

// Returns the value that an output stands for, and its place among its inputs.
template <typename In, typename Operation>
auto findMost(const Reduction<Operation>& by, uint32_t offset) {
  auto most = by.identity;
  int64_t index = 0;
  by.inputs.forEach(by.config.num_inputs, [&](const auto& input) {
    most = by.operation.reduce(
        most, *reinterpret_cast<const In*>(by.from + offset + input[0]),
        index++);
  });
  return most;
}

template <typename In, typename Operation>
void reduceToPlaces(const Launch& launch, const Reduction<Operation>& by) {
  if (by.accumulates || !by.is_final || by.base_index != 0) {
    return launch.fail(proxy::kCudaNotSupported);
  }
  by.outputs.forEach(by.config.num_outputs, [&](const auto& output) {
    const auto most = findMost<In>(by, output[1]);
    const uint32_t place = output[0] / sizeof(In);
    reinterpret_cast<In*>(by.to[0])[place] = convert<In>(most.value);
    if (by.num_outputs > 1) {
      reinterpret_cast<int64_t*>(by.to[1])[place] = most.index;
    }
  });
}

template <typename In, typename Operation>
void reduceToIndices(const Launch& launch, const Reduction<Operation>& by) {
  if (by.accumulates || !by.is_final || by.base_index != 0) {
    return launch.fail(proxy::kCudaNotSupported);
  }
  by.outputs.forEach(by.config.num_outputs, [&](const auto& output) {
    *reinterpret_cast<int64_t*>(by.to[0] + output[0]) =
        findMost<In>(by, output[1]).index;
  });
}

template <typename In, typename Out, typename Operation>
void add(RegisterKernel* add_to, const std::string& operation) {
  // A half is named once, and then by what stands for it.
  const std::string out =
      is_half<Out> && is_half<In> ? "S*_" : std::string(mangled<Out>());
  add_to(("_ZN2at6native13reduce_kernelILi*ENS0_8ReduceOpI" +
          std::string(mangled<In>()) + "*" + operation + "*Ej" + out + "Li*")
             .c_str(),
         onHost<reduce<In, Out, Operation>>);
}

// Sums of all elements up to each one, over a dimension that is not the last.
void sumUpTo(const Launch&, int64_t* to, const int64_t* from,
             uint32_t num_outer, uint32_t num_inner, uint32_t size,
             int64_t first, char) {
  for (uint32_t outer = 0; outer < num_outer; ++outer) {
    for (uint32_t inner = 0; inner < num_inner; ++inner) {
      int64_t sum = first;
      for (uint32_t i = 0; i < size; ++i) {
        const size_t place = (size_t{outer} * size + i) * num_inner + inner;
        to[place] = sum += from[place];
      }
    }
  }
}

template <typename In, typename Out>
void addFor(RegisterKernel* add_to) {
  add<In, Out, Sum<In>>(add_to, "11sum_functor");
  add<In, Out, Mean<In>>(add_to, "7MeanOps");
  add<In, Out, NormTwo<In>>(add_to, "10NormTwoOps");
  add<In, Out, NormOne<In>>(add_to, "10NormOneOps");
}

}  // namespace

void addReductions(RegisterKernel* add_to) {
  addFor<float, float>(add_to);
  addFor<double, double>(add_to);
  addFor<Bfloat16, Bfloat16>(add_to);
  addFor<Bfloat16, float>(add_to);
  forFloating([&](auto number) {
    using T = decltype(number);
    add<T, T, Extreme<T, true>>(add_to, "MaxNanFunctor");
    add<T, T, Extreme<T, false>>(add_to, "MinNanFunctor");
  });
  const std::string reduction =
      "_ZN2at6native13reduce_kernelILi*ENS0_8ReduceOpIf";
  add_to((reduction + "NS0_6MaxOpsIfEEjf*").c_str(),
         onHost<reduceToPlaces<float, PlaceOfExtreme<true>>>);
  add_to((reduction + "NS0_6MinOpsIfEEjf*").c_str(),
         onHost<reduceToPlaces<float, PlaceOfExtreme<false>>>);
  add_to((reduction + "NS0_9ArgMaxOpsIfEEjl*").c_str(),
         onHost<reduceToIndices<float, PlaceOfExtreme<true>>>);
  add<int64_t, int64_t, Extreme<int64_t, true>>(add_to, "MaxNanFunctor");
  add_to("_ZN2at6native28tensor_kernel_scan_outer_dimIljSt4plusIlEEE*",
         onHost<sumUpTo>);
  add<int64_t, int64_t, SumOfIntegers>(add_to, "11sum_functor");
  add<bool, bool, All>(add_to, "15and_kernel_cuda");
  add<bool, bool, Any>(add_to, "14or_kernel_cuda");
}

}  // namespace mnemosyne::torch_kernels
