#include "proxy/emulated/epilogue.h"

#include <cmath>
#include <tuple>

#include "proxy/emulated/blas.h"

namespace mnemosyne::proxy::emulated {
namespace {

// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), as cuBLASLt has it.
constexpr double kSlope = 0.7978845608028654;
constexpr double kCube = 0.044715;

double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(kSlope * (x + kCube * x * x * x)));
}

double geluSlope(double x) {
  const double t = std::tanh(kSlope * (x + kCube * x * x * x));
  return 0.5 * (1 + t) +
         0.5 * x * (1 - t * t) * kSlope * (1 + 3 * kCube * x * x);
}

// The byte and the bit of an element's mark; ld and stride count bits.
uint8_t* markOf(const Matrix& aux, int64_t batch, int64_t row, int64_t column,
                uint8_t* bit) {
  const int64_t index = batch * aux.stride + column * aux.ld + row;
  *bit = static_cast<uint8_t>(1 << (index % 8));
  return reinterpret_cast<uint8_t*>(aux.address) + index / 8;
}

}  // namespace

int Epilogue::check() const {
  constexpr uint32_t kKnown[] = {
      kDefault,
      kBias,
      kRelu,
      kRelu | kBias,
      kRelu | kAux,
      kRelu | kAux | kBias,
      kGelu,
      kGelu | kBias,
      kGelu | kAux,
      kGelu | kAux | kBias,
      kReluGradient | kAux,
      kReluGradient | kAux | kBiasGradient,
      kGeluGradient | kAux,
      kGeluGradient | kAux | kBiasGradient,
      kBiasGradientA,
      kBiasGradientB,
  };
  bool is_known = false;
  for (const uint32_t known : kKnown) is_known |= kind == known;
  if (!is_known || numberSize(bias.type) == 0) return kCublasNotSupported;
  const bool is_mask = has(kRelu | kReluGradient);
  if (has(kAux) && !is_mask && numberSize(aux.type) == 0) {
    return kCublasNotSupported;
  }
  return kCublasSuccess;
}

bool Epilogue::isReachable(const Product& product) const {
  const auto [m, n, num_batches] =
      std::tuple(product.m, product.n, product.num_batches);
  const bool has_bias =
      has(kBias | kBiasGradient | kBiasGradientA | kBiasGradientB);
  if (has_bias && !emulated::isReachable(bias, has(kBiasGradientB) ? n : m, 1,
                                         num_batches)) {
    return false;
  }
  if (!has(kAux)) return true;
  if (!has(kRelu | kReluGradient)) {
    return emulated::isReachable(aux, m, n, num_batches);
  }
  const int64_t last =
      (num_batches - 1) * aux.stride + (n - 1) * aux.ld + m - 1;
  const Memory& memory = device()->memory();
  return memory.isDevice(aux.address, last / 8 + 1);
}

double Epilogue::apply(int64_t batch, int64_t row, int64_t column,
                       double value) const {
  if (has(kBias)) value += bias.read(batch, row, 0);
  if (has(kRelu | kReluGradient)) {
    bool passes = value > 0;
    uint8_t bit;
    if (has(kAux)) {
      uint8_t* const byte = markOf(aux, batch, row, column, &bit);
      if (has(kReluGradient)) {
        passes = (*byte & bit) != 0;
      } else {
        *byte = static_cast<uint8_t>(passes ? *byte | bit : *byte & ~bit);
      }
    }
    if (std::isnan(value) && has(kRelu)) return value;
    return passes ? value : 0;
  }
  if (has(kGelu)) {
    if (has(kAux)) aux.write(batch, row, column, value);
    return gelu(value);
  }
  if (has(kGeluGradient)) {
    return value * geluSlope(aux.read(batch, row, column));
  }
  return value;
}

Epilogue::Sums::Sums(const Epilogue& epilogue, const Product& product)
    : epilogue_(epilogue),
      product_(product),
      size_(epilogue.has(kBiasGradientB)                   ? product.n
            : epilogue.has(kBiasGradientA | kBiasGradient) ? product.m
                                                           : 0),
      sums_(size_ * product.num_batches) {}

void Epilogue::Sums::add(int64_t batch, int64_t row, int64_t /*column*/,
                         double value) {
  if (epilogue_.has(kBiasGradient)) sums_[batch * size_ + row] += value;
}

void Epilogue::Sums::finish() {
  const bool of_a = epilogue_.has(kBiasGradientA);
  for (int64_t batch = 0; size_ > 0 && batch < product_.num_batches; ++batch) {
    for (int64_t i = 0; i < size_; ++i) {
      double& sum = sums_[batch * size_ + i];
      if (of_a || epilogue_.has(kBiasGradientB)) {
        const Matrix& matrix = of_a ? product_.a : product_.b;
        const bool along_ld =
            of_a ? product_.transpose_a : !product_.transpose_b;
        for (int64_t p = 0; p < product_.k; ++p) {
          sum += along_ld ? matrix.read(batch, p, i) : matrix.read(batch, i, p);
        }
      }
      epilogue_.bias.write(batch, i, 0, sum);
    }
  }
}

}  // namespace mnemosyne::proxy::emulated
