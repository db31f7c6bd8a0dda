// cuBLAS: products with vectors, and triangular systems.
#include <algorithm>
#include <vector>

#include "proxy/emulated/blas.h"

namespace mnemosyne::proxy::emulated {
namespace {

// Elements `step` apart; a negative step counts from the other end.
struct Vector {
  uint64_t address;
  int type;
  int64_t size;
  int64_t step;

  bool isReachable() const {
    const Matrix matrix = {address, type, std::abs(step), 0};
    return emulated::isReachable(matrix, 1, size);
  }
  void* data() const { return reinterpret_cast<void*>(address); }
  int64_t at(int64_t i) const {
    return step >= 0 ? i * step : (size - 1 - i) * -step;
  }
  double read(int64_t i) const { return readNumber(type, data(), at(i)); }
  void write(int64_t i, double value) const {
    writeNumber(type, data(), at(i), value);
  }
};

uint64_t number(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}

template <typename T>
struct Gemv {
  Matrix a;
  bool is_transposed;
  Vector x, y;
  Scalar alpha, beta;

  int run() const {
    const int64_t rows = is_transposed ? x.size : y.size;
    const int64_t columns = is_transposed ? y.size : x.size;
    if (!isReachable(a, rows, columns) || !x.isReachable() ||
        !y.isReachable()) {
      return kCudaIllegalAddress;
    }
    const T by = static_cast<T>(alpha.value());
    const T keep = static_cast<T>(beta.value());
    for (int64_t i = 0; i < y.size; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < x.size; ++j) {
        const int64_t row = is_transposed ? j : i;
        const int64_t column = is_transposed ? i : j;
        sum += a.column<const T>(0, column)[row] * static_cast<T>(x.read(j));
      }
      T value = by * sum;
      if (keep != 0) value += keep * static_cast<T>(y.read(i));
      y.write(i, value);
    }
    return kCudaSuccess;
  }
};

template <typename T>
int gemv(int type, void* handle, int operation, int m, int n, const T* alpha,
         const T* a, int lda, const T* x, int step_x, const T* beta, T* y,
         int step_y) {
  BlasHandle* const blas = blasHandle(handle);
  if (blas == nullptr) return kCublasNotInitialized;
  if (operation < 0 || operation > 2 || m < 0 || n < 0 ||
      lda < std::max(1, m) || step_x == 0 || step_y == 0) {
    return kCublasInvalidValue;
  }
  if (m == 0 || n == 0) return kCublasSuccess;
  const bool is_transposed = operation != 0;
  const Gemv<T> work = {{number(a), type, lda, 0},
                        is_transposed,
                        {number(x), type, is_transposed ? m : n, step_x},
                        {number(y), type, is_transposed ? n : m, step_y},
                        blas->scalar(type, alpha),
                        blas->scalar(type, beta)};
  return submitBlas(blas->stream, [work] { return work.run(); });
}

int dot(void* handle, const Vector& x, const Vector& y, void* result,
        int result_type, int execution_type) {
  BlasHandle* const blas = blasHandle(handle);
  if (blas == nullptr) return kCublasNotInitialized;
  if (numberSize(x.type) == 0 || numberSize(y.type) == 0 ||
      numberSize(result_type) == 0) {
    return kCublasNotSupported;
  }
  // A result in the host's memory is there when the call returns.
  const bool wait = blas->pointer_mode == 0;
  return submitBlas(
      blas->stream,
      [=]() -> int {
        if (!x.isReachable() || !y.isReachable()) return kCudaIllegalAddress;
        if (execution_type == kFloat64) {
          double sum = 0;
          for (int64_t i = 0; i < x.size; ++i) sum += x.read(i) * y.read(i);
          writeNumber(result_type, result, 0, sum);
        } else {
          float sum = 0;
          for (int64_t i = 0; i < x.size; ++i) {
            sum +=
                static_cast<float>(x.read(i)) * static_cast<float>(y.read(i));
          }
          writeNumber(result_type, result, 0, sum);
        }
        return kCudaSuccess;
      },
      wait);
}

// Solves op(A) X = alpha B, or X op(A) = alpha B, into B.
template <typename T>
struct Trsm {
  bool is_left, is_upper, is_transposed, is_unit;
  int64_t m, n;  // of B
  Matrix a, b;
  Scalar alpha;

  // X op(A) = B is op(A)^T X^T = B^T: the same with rows for columns.
  T get(int64_t row, int64_t column) const {
    if (is_transposed == is_left) std::swap(row, column);
    return a.column<const T>(0, column)[row];
  }
  T& at(int64_t line, int64_t i) const {
    return is_left ? b.column<T>(0, line)[i] : b.column<T>(0, i)[line];
  }

  int run() const {
    const int64_t size = is_left ? m : n;
    if (!isReachable(a, size, size) || !isReachable(b, m, n)) {
      return kCudaIllegalAddress;
    }
    const T by = static_cast<T>(alpha.value());
    // The matrix that get() gives is upper triangular, so the last unknown
    // comes first.
    const bool backward = is_upper == (is_transposed != is_left);
    for (int64_t line = 0; line < (is_left ? n : m); ++line) {
      for (int64_t step = 0; step < size; ++step) {
        const int64_t i = backward ? size - 1 - step : step;
        T value = by * at(line, i);
        for (int64_t done = 0; done < step; ++done) {
          const int64_t j = backward ? size - 1 - done : done;
          value -= get(i, j) * at(line, j);
        }
        at(line, i) = is_unit ? value : value / get(i, i);
      }
    }
    return kCudaSuccess;
  }
};

template <typename T>
int trsm(int type, void* handle, int side, int fill, int operation,
         int diagonal, int m, int n, const T* alpha, const T* a, int lda, T* b,
         int ldb) {
  BlasHandle* const blas = blasHandle(handle);
  if (blas == nullptr) return kCublasNotInitialized;
  const bool is_left = side == 0;
  if (side < 0 || side > 1 || fill < 0 || fill > 1 || operation < 0 ||
      operation > 2 || diagonal < 0 || diagonal > 1 || m < 0 || n < 0 ||
      lda < std::max(1, is_left ? m : n) || ldb < std::max(1, m)) {
    return kCublasInvalidValue;
  }
  if (m == 0 || n == 0) return kCublasSuccess;
  const Trsm<T> work = {is_left,
                        fill == 1,
                        operation != 0,
                        diagonal == 1,
                        m,
                        n,
                        {number(a), type, lda, 0},
                        {number(b), type, ldb, 0},
                        blas->scalar(type, alpha)};
  return submitBlas(blas->stream, [work] { return work.run(); });
}

}  // namespace
}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int cublasDotEx(void* handle, int n, const void* x, int type_x,
                                 int step_x, const void* y, int type_y,
                                 int step_y, void* result, int result_type,
                                 int execution_type) {
  return dot(handle, {number(x), type_x, n, step_x},
             {number(y), type_y, n, step_y}, result, result_type,
             execution_type);
}

// The names for one type each.
#define VECTORS(name, T, type)                                                 \
  MNEMOSYNE_EXPORT int cublas##name##gemv_v2(                                  \
      void* handle, int operation, int m, int n, const T* alpha, const T* a,   \
      int lda, const T* x, int step_x, const T* beta, T* y, int step_y) {      \
    return gemv<T>(type, handle, operation, m, n, alpha, a, lda, x, step_x,    \
                   beta, y, step_y);                                           \
  }                                                                            \
  MNEMOSYNE_EXPORT int cublas##name##dot_v2(void* handle, int n, const T* x,   \
                                            int step_x, const T* y,            \
                                            int step_y, T* result) {           \
    return cublasDotEx(handle, n, x, type, step_x, y, type, step_y, result,    \
                       type, type);                                            \
  }                                                                            \
  MNEMOSYNE_EXPORT int cublas##name##trsm_v2(                                  \
      void* handle, int side, int fill, int operation, int diagonal, int m,    \
      int n, const T* alpha, const T* a, int lda, T* b, int ldb) {             \
    return trsm<T>(type, handle, side, fill, operation, diagonal, m, n, alpha, \
                   a, lda, b, ldb);                                            \
  }
VECTORS(S, float, kFloat32)
VECTORS(D, double, kFloat64)
