// What the backend asks of tensors, and their memory as buffers.
//
// A mistake of the caller is a RuntimeError, as gloo makes it.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include <torch/csrc/distributed/c10d/Types.hpp>

#include "ccl/operation.h"

namespace mnemosyne::ccl {

using Tensors = std::vector<at::Tensor>;

// kBytes for types that can be moved but not reduced.
DataType dataTypeOf(const at::Tensor& tensor);
ReduceOp reduceOpOf(const c10d::ReduceOp& op);

void checkTensor(const char* what, const at::Tensor& tensor);
// That there are as many, all dense and of one type.
void checkTensors(const char* what, const Tensors& tensors, size_t count);
void checkNumel(const char* what, const at::Tensor& tensor, int64_t want);
void checkSameType(const char* what, const at::Tensor& a, const at::Tensor& b);
void checkSameShape(const char* what, const at::Tensor& a, const at::Tensor& b);

bool isPlain(const at::Tensor& tensor);
// The tensor itself, or a contiguous copy without lazy conjugation.
at::Tensor plain(const at::Tensor& tensor);

// Requires: isPlain(tensor).
Buffer bufferOf(const at::Tensor& tensor);
// The n-th of `count` equal parts.
Buffer partOf(const Buffer& whole, int n, int count);
void copyBytes(const Buffer& to, const Buffer& from);
size_t totalBytes(const Tensors& tensors);

// Hashes what all ranks must have in common, for Operation::agreed.
class Agreement {
 public:
  Agreement& operator<<(uint64_t value) {
    hash_ = (hash_ ^ value) * 0x9e3779b97f4a7c15;
    hash_ ^= hash_ >> 32;
    return *this;
  }
  Agreement& operator<<(const at::Tensor& type_of) {
    return *this << static_cast<uint64_t>(type_of.scalar_type());
  }
  uint64_t hash() const { return hash_; }

 private:
  uint64_t hash_ = 0;
};

// Parts of a buffer, one after another.
class Packer {
 public:
  explicit Packer(const Buffer& whole) : whole_(whole) {}
  Buffer next(size_t size) {
    const Buffer part{whole_.data + used_, size};
    used_ += size;
    return part;
  }

 private:
  Buffer whole_;
  size_t used_ = 0;
};

}  // namespace mnemosyne::ccl
