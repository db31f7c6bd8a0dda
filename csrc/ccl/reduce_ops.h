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

// out[i] = a[i] op b[i]. `out` may be `a` or `b`. kAverage adds; divide() ends
// it. Where the order of operands shows (NaN, -0), the caller passes the lower
// rank's values as `a`, so that all ranks get the same bits.
void reduce(DataType type, ReduceOp op, void* out, const void* a, const void* b,
            size_t num_bytes);

// data[i] /= divisor; integers round towards zero.
void divide(DataType type, void* data, int divisor, size_t num_bytes);

}  // namespace mnemosyne::ccl
