// Products of matrices in a fixed order, so that a result never depends on
// anything but its operands: each element is the sum over k, from the first to
// the last, in float (in double for double), rounded once.
#pragma once

#include <cstdint>
#include <vector>

#include "proxy/emulated/numbers.h"

namespace mnemosyne::proxy::emulated {

// A matrix in memory, column by column, and the next of a batch `stride`
// elements behind it.
struct Matrix {
  uint64_t address = 0;
  int type = kFloat32;
  int64_t ld = 0;
  int64_t stride = 0;

  template <typename T>
  T* column(int64_t batch, int64_t index) const {
    return reinterpret_cast<T*>(address) + batch * stride + index * ld;
  }
  double read(int64_t batch, int64_t row, int64_t col) const {
    return readNumber(type, reinterpret_cast<const void*>(address),
                      batch * stride + col * ld + row);
  }
  void write(int64_t batch, int64_t row, int64_t col, double value) const {
    writeNumber(type, reinterpret_cast<void*>(address),
                batch * stride + col * ld + row, value);
  }
};

// op(A) of m x k times op(B) of k x n.
struct Product {
  int64_t m = 0, n = 0, k = 0, num_batches = 1;
  Matrix a, b;
  bool transpose_a = false, transpose_b = false;
};

constexpr int64_t kTileRows = 8;  // two registers of floats at least
constexpr int64_t kTileColumns = 4;

// Lines [0, num_lines) of the matrix, `depth` elements each, in tiles of
// `tile` lines in which elements of the same depth lie side by side; zeros
// fill the last one up. A line is a row, or a column if they lie along ld.
template <typename Sum>
std::vector<Sum> packLines(const Matrix& matrix, int64_t batch,
                           bool lines_are_columns, int64_t num_lines,
                           int64_t depth, int64_t tile) {
  std::vector<Sum> packed((num_lines + tile - 1) / tile * tile * depth);
  withNumberType(matrix.type, [&](auto number) {
    using T = decltype(number);
    const int64_t outer = lines_are_columns ? num_lines : depth;
    const int64_t inner = lines_are_columns ? depth : num_lines;
    for (int64_t o = 0; o < outer; ++o) {
      const T* const column = matrix.column<const T>(batch, o);
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t line = lines_are_columns ? o : i;
        const int64_t at = lines_are_columns ? i : o;
        packed[(line / tile * depth + at) * tile + line % tile] =
            static_cast<Sum>(column[i]);
      }
    }
  });
  return packed;
}

// Calls finish(batch, row, column, sum) for each element of the product.
template <typename Sum, typename Finish>
void multiply(const Product& product, Finish&& finish) {
  const auto [m, n, k, num_batches, a, b, transpose_a, transpose_b] = product;
  for (int64_t batch = 0; batch < num_batches; ++batch) {
    const auto rows = packLines<Sum>(a, batch, transpose_a, m, k, kTileRows);
    const auto columns =
        packLines<Sum>(b, batch, !transpose_b, n, k, kTileColumns);
    for (int64_t j = 0; j < n; j += kTileColumns) {
      for (int64_t i = 0; i < m; i += kTileRows) {
        Sum sums[kTileColumns][kTileRows] = {};
        const Sum* left = rows.data() + i * k;
        const Sum* right = columns.data() + j * k;
        for (int64_t p = 0; p < k; ++p) {
          for (int64_t c = 0; c < kTileColumns; ++c) {
            for (int64_t r = 0; r < kTileRows; ++r) {
              sums[c][r] += left[r] * right[c];
            }
          }
          left += kTileRows;
          right += kTileColumns;
        }
        for (int64_t c = 0; c < kTileColumns && j + c < n; ++c) {
          for (int64_t r = 0; r < kTileRows && i + r < m; ++r) {
            finish(batch, i + r, j + c, sums[c][r]);
          }
        }
      }
    }
  }
}

}  // namespace mnemosyne::proxy::emulated
