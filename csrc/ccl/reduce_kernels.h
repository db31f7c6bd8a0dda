// The loops of reduce_ops.h, built once for each instruction set.
#pragma once

#include <cstddef>
#include <span>

#include "ccl/reduce_ops.h"

namespace mnemosyne::ccl {

// For real types only; an operation that the type does not have does nothing.
// All give the same bits.
struct Kernels {
  void (*reduce)(DataType type, ReduceOp op, void* out, const void* a,
                 const void* b, size_t num_bytes);
  void (*divide)(DataType type, void* data, int divisor, size_t num_bytes);
};

// What this processor can run, the fastest last.
std::span<const Kernels* const> runnableKernels();

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;    // x86-64 only
extern const Kernels kAvx512Kernels;  // x86-64 only

}  // namespace mnemosyne::ccl
