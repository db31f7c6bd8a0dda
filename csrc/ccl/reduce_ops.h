// Element-wise reductions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemosyne::ccl {

enum class DataType : uint8_t {
  kBytes,  // anything that is only moved
  kBool,
  kInt8,
  kUint8,
  kInt16,
  kInt32,
  kInt64,
  kFloat16,
  kBfloat16,
  kFloat32,
  kFloat64,
  kComplex64,
  kComplex128,
};

enum class ReduceOp : uint8_t {
  kSum,
  kAverage,
  kProduct,
  kMin,
  kMax,
  kBitAnd,
  kBitOr,
  kBitXor,
};

size_t elementBytes(DataType type);

// Whether the operation makes sense for the type.
bool canReduce(DataType type, ReduceOp op);

// out[i] = a[i] op b[i]. `out` may be `a` or `b`, but not overlap them
// otherwise; none needs to be aligned. kAverage adds; divide() ends it. Half
// types are widened to float and rounded to the nearest, ties to even.
//
// The bits do not depend on the instructions that the processor has. Of two
// NaNs, sum and product take the payload of `a`, min and max that of `b`; NaN
// wins over numbers. What was computed, and a half in any case, is a quiet NaN;
// one made from numbers (inf - inf) has the sign that the architecture gives
// it. Of zeros, min and max take `a`. Not promised: NaNs of complex products.
// So that all ranks get the same bits, the caller passes the lower rank's
// values as `a`.
void reduce(DataType type, ReduceOp op, void* out, const void* a, const void* b,
            size_t num_bytes);

// out[i] = inputs[0][i] op inputs[1][i] op ..., from the left, in one pass over
// memory. The bits are those of a chain of reduce(). `out` may be any of the
// inputs, but not overlap them otherwise. Requires: count > 0.
void reduceMany(DataType type, ReduceOp op, void* out,
                const void* const* inputs, int count, size_t num_bytes);

// data[i] /= divisor; integers round towards zero. Requires: divisor > 0.
void divide(DataType type, void* data, int divisor, size_t num_bytes);

}  // namespace mnemosyne::ccl
