#include "ccl/backend_tensors.h"

#include <cstring>

namespace mnemosyne::ccl {

DataType dataTypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBool:
      return DataType::kBool;
    case at::kChar:
      return DataType::kInt8;
    case at::kByte:
      return DataType::kUint8;
    case at::kShort:
      return DataType::kInt16;
    case at::kInt:
      return DataType::kInt32;
    case at::kLong:
      return DataType::kInt64;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kBFloat16:
      return DataType::kBfloat16;
    case at::kFloat:
      return DataType::kFloat32;
    case at::kDouble:
      return DataType::kFloat64;
    case at::kComplexFloat:
      return DataType::kComplex64;
    case at::kComplexDouble:
      return DataType::kComplex128;
    default:
      return DataType::kBytes;
  }
}

ReduceOp reduceOpOf(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return ReduceOp::kSum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::kAverage;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::kProduct;
    case c10d::ReduceOp::MIN:
      return ReduceOp::kMin;
    case c10d::ReduceOp::MAX:
      return ReduceOp::kMax;
    case c10d::ReduceOp::BAND:
      return ReduceOp::kBitAnd;
    case c10d::ReduceOp::BOR:
      return ReduceOp::kBitOr;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::kBitXor;
    default:
      TORCH_CHECK(false, "mnemosyne: cannot use ReduceOp.PREMUL_SUM; multiply ",
                  "the tensor and use ReduceOp.SUM");
  }
}

void checkTensor(const char* what, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), "mnemosyne ", what, ": undefined tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided && tensor.is_cpu(), "mnemosyne ",
              what, ": expected a dense CPU tensor, got ", tensor.toString());
}

void checkTensors(const char* what, const Tensors& tensors, size_t count) {
  TORCH_CHECK(tensors.size() == count, "mnemosyne ", what, ": expected ", count,
              " tensors, got ", tensors.size());
  for (const at::Tensor& tensor : tensors) {
    checkTensor(what, tensor);
    TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "mnemosyne ",
                what, ": tensors of different types");
  }
}

void checkNumel(const char* what, const at::Tensor& tensor, int64_t want) {
  TORCH_CHECK(tensor.numel() == want, "mnemosyne ", what, ": expected ", want,
              " elements, got ", tensor.numel());
}

void checkSameType(const char* what, const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "mnemosyne ", what,
              ": input is ", a.scalar_type(), ", output is ", b.scalar_type());
}

void checkSameShape(const char* what, const at::Tensor& a,
                    const at::Tensor& b) {
  TORCH_CHECK(a.sizes() == b.sizes(), "mnemosyne ", what,
              ": invalid tensor size: expected ", a.sizes(), ", got ",
              b.sizes());
}

bool isPlain(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

at::Tensor plain(const at::Tensor& tensor) {
  return isPlain(tensor) ? tensor
                         : tensor.resolve_conj().resolve_neg().contiguous();
}

Buffer bufferOf(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

Buffer partOf(const Buffer& whole, int n, int count) {
  const size_t size = whole.size / count;
  return {whole.data + n * size, size};
}

void copyBytes(const Buffer& to, const Buffer& from) {
  if (from.size > 0) std::memcpy(to.data, from.data, from.size);
}

size_t totalBytes(const Tensors& tensors) {
  size_t total = 0;
  for (const at::Tensor& tensor : tensors) total += tensor.nbytes();
  return total;
}

}  // namespace mnemosyne::ccl
