// What cuBLASLt does with a product before it stores it.
#pragma once

#include <cstdint>
#include <vector>

#include "proxy/emulated/gemm.h"

namespace mnemosyne::proxy::emulated {

struct Epilogue {
  // cublasLtEpilogue_t is a sum of these.
  enum Kind : uint32_t {
    kDefault = 1,
    kRelu = 2,
    kBias = 4,
    kReluGradient = 8,
    kBiasGradient = 16,  // of the result, together with another gradient
    kGelu = 32,
    kGeluGradient = 64,
    kAux = 128,
    kBiasGradientA = 256,  // sums over k of A, or of B
    kBiasGradientB = 512,
  };

  uint32_t kind = kDefault;
  Matrix bias;  // one column: as long as the result's, for B as its row
  // What the forward pass keeps for the backward pass: the input of gelu; for
  // relu a bit for each element, which says whether it passed.
  Matrix aux;

  bool has(uint32_t kinds) const { return (kind & kinds) != 0; }

  // Whether it is complete and known; a CublasStatus.
  int check() const;
  bool isReachable(const Product& product) const;

  // The value that is stored for the element.
  double apply(int64_t batch, int64_t row, int64_t column, double value) const;

  // The gradient of the bias: sums that are stored at the end.
  class Sums {
   public:
    Sums(const Epilogue& epilogue, const Product& product);
    void add(int64_t batch, int64_t row, int64_t column, double value);
    void finish();

   private:
    const Epilogue& epilogue_;
    const Product& product_;
    const int64_t size_;  // of a batch's
    std::vector<double> sums_;
  };
};

}  // namespace mnemosyne::proxy::emulated
