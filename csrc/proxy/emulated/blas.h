// What the exported functions of cuBLAS and cuBLASLt have in common.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "proxy/cuda_abi.h"
#include "proxy/emulated/driver.h"
#include "proxy/emulated/gemm.h"

namespace mnemosyne::proxy::emulated {

enum ComputeType : int {  // cublasComputeType_t
  kCompute16F = 64,
  kCompute16FPedantic = 65,
  kCompute32F = 68,
  kCompute32FPedantic = 69,
  kCompute64F = 70,
  kCompute64FPedantic = 71,
  kCompute32FFast16F = 74,
  kCompute32FFast16BF = 75,
  kCompute32FFastTF32 = 77,
};

// The type that alpha and beta have in cuBLAS, -1 for what is not supported.
int scalarType(int compute_type);

// alpha or beta: a number, or the place in the device's memory that holds it
// by the time it is used.
class Scalar {
 public:
  Scalar() = default;
  Scalar(int type, const void* at, bool on_device)
      : type_(type), at_(on_device ? at : nullptr) {
    if (!on_device && at != nullptr) value_ = readNumber(type, at);
  }
  double value() const { return at_ ? readNumber(type_, at_) : value_; }

 private:
  int type_ = kFloat32;
  const void* at_ = nullptr;
  double value_ = 0;
};

// cublasHandle_t
struct BlasHandle {
  void* stream = nullptr;
  int pointer_mode = 0;
  int math_mode = 0;
  int sm_count_target = 0;

  Scalar scalar(int type, const void* at) const {
    return {type, at, pointer_mode != 0};
  }
};

// The handle, or null for what is none.
BlasHandle* blasHandle(void* handle);

// Whether the device can use all of `num` columns of `rows` elements, and that
// of each batch. Bodies of operations ask, so that what a real kernel would
// break the device with does the same here.
bool isReachable(const Matrix& matrix, int64_t rows, int64_t columns,
                 int64_t num_batches = 1);

// Puts the body into the stream; returns a CublasStatus. Waits for its end if
// `wait` is set.
int submitBlas(void* stream, std::function<int()> body, bool wait = false);

}  // namespace mnemosyne::proxy::emulated
