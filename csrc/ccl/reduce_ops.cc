#include "ccl/reduce_ops.h"

#include <algorithm>
#include <array>
#include <complex>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "ccl/reduce_kernels.h"
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace mnemosyne::ccl {
namespace {

#ifdef __x86_64__
// __builtin_cpu_supports() also asks whether the system saves the registers.
bool hasAvx2() {
  unsigned a, b, c, d;  // clang 14 has no name for F16C
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C) != 0;
}
bool hasAvx512() {
  return hasAvx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& fastest() {
  static const Kernels& found = *runnableKernels().back();
  return found;
}

// Only the product sees a complex number as more than two real ones.
DataType realType(DataType type) {
  if (type == DataType::kComplex64) return DataType::kFloat32;
  if (type == DataType::kComplex128) return DataType::kFloat64;
  return type;
}

// Rare: one path will do.
template <typename T>
void multiplyComplex(void* out, const void* a, const void* b,
                     size_t num_bytes) {
  for (size_t i = 0; i + sizeof(T) <= num_bytes; i += sizeof(T)) {
    T x, y;
    std::memcpy(&x, static_cast<const std::byte*>(a) + i, sizeof(T));
    std::memcpy(&y, static_cast<const std::byte*>(b) + i, sizeof(T));
    x *= y;
    std::memcpy(static_cast<std::byte*>(out) + i, &x, sizeof(T));
  }
}

}  // namespace

std::span<const Kernels* const> runnableKernels() {
  static const std::vector<const Kernels*> runnable = [] {
    std::vector<const Kernels*> found = {&kBaselineKernels};
#ifdef __x86_64__
    if (hasAvx2()) found.push_back(&kAvx2Kernels);
    if (hasAvx512()) found.push_back(&kAvx512Kernels);
#endif
    return found;
  }();
  return runnable;
}

size_t elementBytes(DataType type) {
  switch (type) {
    case DataType::kBytes:
    case DataType::kBool:
    case DataType::kInt8:
    case DataType::kUint8:
      return 1;
    case DataType::kInt16:
    case DataType::kFloat16:
    case DataType::kBfloat16:
      return 2;
    case DataType::kInt32:
    case DataType::kFloat32:
      return 4;
    case DataType::kInt64:
    case DataType::kFloat64:
    case DataType::kComplex64:
      return 8;
    case DataType::kComplex128:
      return 16;
  }
  throw std::logic_error("unknown data type");
}

bool canReduce(DataType type, ReduceOp op) {
  if (type == DataType::kBytes) return false;
  const bool is_integer = type <= DataType::kInt64;
  const bool is_complex =
      type == DataType::kComplex64 || type == DataType::kComplex128;
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kProduct:
      return true;
    case ReduceOp::kAverage:
      return type != DataType::kBool;
    case ReduceOp::kMin:
    case ReduceOp::kMax:
      return !is_complex;
    case ReduceOp::kBitAnd:
    case ReduceOp::kBitOr:
    case ReduceOp::kBitXor:
      return is_integer;
  }
  return false;
}

void reduce(DataType type, ReduceOp op, void* out, const void* a, const void* b,
            size_t num_bytes) {
  if (!canReduce(type, op)) throw std::logic_error("no such reduction");
  if (op == ReduceOp::kProduct) {
    if (type == DataType::kComplex64)
      return multiplyComplex<std::complex<float>>(out, a, b, num_bytes);
    if (type == DataType::kComplex128)
      return multiplyComplex<std::complex<double>>(out, a, b, num_bytes);
  }
  fastest().reduce(realType(type), op, out, a, b, num_bytes);
}

void reduceMany(DataType type, ReduceOp op, void* out,
                const void* const* inputs, int count, size_t num_bytes) {
  if (num_bytes == 0) return;  // an empty tensor's pointer may be null
  if (count == 1) {
    std::memmove(out, inputs[0], num_bytes);
    return;
  }
  // The partial result of a block stays in the first-level cache, beside what
  // arrives. `out` is written to last, as it may be any of the inputs.
  constexpr size_t kBlockBytes = 8 << 10;
  alignas(64) std::array<std::byte, kBlockBytes> partial;
  for (size_t offset = 0; offset < num_bytes; offset += kBlockBytes) {
    const size_t size = std::min(kBlockBytes, num_bytes - offset);
    const auto input = [&](int i) {
      return static_cast<const std::byte*>(inputs[i]) + offset;
    };
    const std::byte* left = input(0);
    for (int i = 1; i < count - 1; ++i) {
      reduce(type, op, partial.data(), left, input(i), size);
      left = partial.data();
    }
    reduce(type, op, static_cast<std::byte*>(out) + offset, left,
           input(count - 1), size);
  }
}

void divide(DataType type, void* data, int divisor, size_t num_bytes) {
  if (type == DataType::kBytes) throw std::logic_error("no such reduction");
  fastest().divide(realType(type), data, divisor, num_bytes);
}

}  // namespace mnemosyne::ccl
