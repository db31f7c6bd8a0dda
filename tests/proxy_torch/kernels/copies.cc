// Fills, copies, casts, ranges and concatenations.
#include "elementwise.h"
#include "kernels.h"

namespace mnemosyne::torch_kernels {
namespace {

template <typename T>
struct Fill {  // FillFunctor
  T value;
  T operator()() const { return value; }
};
template <typename T>
struct Copy {
  T operator()(T value) const { return value; }
};
template <typename To, typename From>
struct Cast {
  To operator()(From value) const { return convert<To>(value); }
};

// elementwise_kernel_with_index: of arange, which counts in this type.
template <typename Count>
struct Range {
  Count start, step;
  EndOfCaptures end;
};
template <typename T, typename Index, typename Count>
void fillRange(const Launch&, Index count, const Range<Count>& range, T* to) {
  for (Index i = 0; i < count; ++i) {
    to[i] = convert<T>(range.start + range.step * static_cast<Count>(i));
  }
}

// dispatch: which of AT_DISPATCH's lambdas is the type's.
template <typename T, typename Count>
void addRange(RegisterKernel* add_to, const char* dispatch) {
  const auto add = [&](const std::string& index, auto* kernel) {
    add_to(("_ZN*29elementwise_kernel_with_indexI" + index +
            "*15arange_cuda_out*ENKUlvE" + dispatch + "_clEvEUllE_E*")
               .c_str(),
           kernel);
  };
  add("i", onHost<fillRange<T, int, Count>>);
  add("l", onHost<fillRange<T, int64_t, Count>>);
}

constexpr int kCatDims = 4;
struct SizeStride {
  uint32_t sizes[kCatDims], strides[kCatDims];
};
// CatArrInputTensorMetadata
template <int num_inputs, int num_strides>
struct CatInputs {
  const char* data[num_inputs];
  uint32_t offset[num_inputs];
  uint32_t size[num_inputs];
  uint32_t count[num_inputs];
  bool is_contiguous[num_inputs];
  SizeStride layouts[num_strides];
};

// Where the element is, in a tensor of these sizes but `size` along `along`.
inline uint32_t placeOf(uint32_t index, const uint32_t* sizes,
                        const uint32_t* strides, int num_dims, int along,
                        uint32_t size) {
  uint32_t place = 0;
  for (int dim = num_dims - 1; dim > 0; --dim) {
    const uint32_t extent = dim == along ? size : sizes[dim];
    place += index % extent * strides[dim];
    index /= extent;
  }
  return place + index * strides[0];
}

template <typename T, int num_dims, int num_inputs, int num_strides>
void concatenate(const Launch& launch, T* to,
                 const CatInputs<num_inputs, num_strides>& inputs,
                 const SizeStride& output, int along, uint32_t stride) {
  for (uint32_t input = 0; input < launch.grid.y; ++input) {
    const auto* const from = reinterpret_cast<const T*>(inputs.data[input]);
    const uint32_t size = inputs.size[input];
    T* const begin = to + size_t{inputs.offset[input]} * stride;
    const SizeStride& layout = inputs.layouts[num_strides > 1 ? input : 0];
    const bool is_contiguous = num_strides == 1 || inputs.is_contiguous[input];
    for (uint32_t i = 0; i < inputs.count[input]; ++i) {
      const uint32_t source =
          is_contiguous
              ? i
              : placeOf(i, layout.sizes, layout.strides, num_dims, along, size);
      begin[placeOf(i, output.sizes, output.strides, num_dims, along, size)] =
          from[source];
    }
  }
}

// The same in units of 16 bytes.
struct Unit {
  uint64_t halves[2];
};
template <typename T, int num_dims, int num_inputs>
void concatenateUnits(const Launch& launch, Unit* to,
                      const CatInputs<num_inputs, 1>& inputs,
                      const SizeStride& output, int along, uint32_t trailing) {
  constexpr uint32_t kPerUnit = sizeof(Unit) / sizeof(T);
  for (uint32_t input = 0; input < launch.grid.y; ++input) {
    const auto* const from = reinterpret_cast<const Unit*>(inputs.data[input]);
    const uint32_t size = inputs.size[input] * trailing / kPerUnit;
    Unit* const begin = to + inputs.offset[input] * trailing / kPerUnit;
    for (uint32_t i = 0; i < inputs.count[input] / kPerUnit; ++i) {
      begin[placeOf(i, output.sizes, output.strides, num_dims, along, size)] =
          from[i];
    }
  }
}

template <typename T, int num_dims>
void addConcatenation(RegisterKernel* add_to) {
  const auto add = [&](const char* name, const std::string& rest,
                       auto* kernel) {
    add_to((std::string("_ZN2at6native*") + name + "*OpaqueTypeILj" +
            std::to_string(sizeof(T)) + "EEEjLi" + std::to_string(num_dims) +
            "ELi" + rest)
               .c_str(),
           kernel);
  };
  add("19CatArrayBatchedCopyI", "64ELi64EE*",
      onHost<concatenate<T, num_dims, 64, 64>>);
  add("26CatArrayBatchedCopy_contigI", "128ELi1EE*",
      onHost<concatenate<T, num_dims, 128, 1>>);
  add("35CatArrayBatchedCopy_alignedK_contigI", "128ELi1ELi*",
      onHost<concatenate<T, num_dims, 128, 1>>);
  add("30CatArrayBatchedCopy_vectorizedI", "128ELi1ELi16E*",
      onHost<concatenateUnits<T, num_dims, 128>>);
}

template <typename T>
void addFor(RegisterKernel* add_to) {
  addElementwise<Fill<T>>(
      add_to, std::string("NS0_11FillFunctorI") + mangled<T>() + "EE");
  addElementwise<Copy<T>>(add_to, lambda<T>("23direct_copy_kernel_cuda"));
}

template <typename T>
void addConcatenations(RegisterKernel* add_to) {
  addConcatenation<T, 1>(add_to);
  addConcatenation<T, 2>(add_to);
  addConcatenation<T, 3>(add_to);
  addConcatenation<T, 4>(add_to);
}

}  // namespace

void addCopies(RegisterKernel* add_to) {
  addFor<bool>(add_to);
  addFor<uint8_t>(add_to);
  addFor<int32_t>(add_to);
  addFor<int64_t>(add_to);
  addFor<double>(add_to);
  forFloating([&](auto number) { addFor<decltype(number)>(add_to); });
  addElementwise<Cast<Bfloat16, float>>(
      add_to, lambda<float>("25bfloat16_copy_kernel_cuda"));
  addRange<int64_t, int64_t>(add_to, "2");
  addRange<float, float>(add_to, "5");
  addConcatenations<uint8_t>(add_to);
  addConcatenations<uint16_t>(add_to);
  addConcatenations<uint32_t>(add_to);
  addConcatenations<uint64_t>(add_to);
}

}  // namespace mnemosyne::torch_kernels
