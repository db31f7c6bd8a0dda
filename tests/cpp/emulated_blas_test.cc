// The emulated device's products of matrices, against loops written down here.
#include <cmath>
#include <cstring>

#include "emulated_api.h"
#include "proxy/emulated/numbers.h"
#include "test.h"

extern "C" {
int cublasCreate_v2(void**);
int cublasDestroy_v2(void*);
int cublasSetStream_v2(void*, void*);
int cublasSetPointerMode_v2(void*, int);
int cublasSgemm_v2(void*, int, int, int, int, int, const float*, const float*,
                   int, const float*, int, const float*, float*, int);
int cublasDgemmStridedBatched(void*, int, int, int, int, int, const double*,
                              const double*, int, long long, const double*, int,
                              long long, const double*, double*, int, long long,
                              int);
int cublasGemmEx(void*, int, int, int, int, int, const void*, const void*, int,
                 int, const void*, int, int, const void*, void*, int, int, int,
                 int);
int cublasSgemv_v2(void*, int, int, int, const float*, const float*, int,
                   const float*, int, const float*, float*, int);
int cublasSdot_v2(void*, int, const float*, int, const float*, int, float*);
int cublasStrsm_v2(void*, int, int, int, int, int, int, const float*,
                   const float*, int, float*, int);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulDescDestroy(void*);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatrixLayoutDestroy(void*);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulPreferenceDestroy(void*);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*,
                                   void*, int,
                                   mnemosyne::proxy::LtHeuristicResult*, int*);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*,
                   void*, const void*, const void*, void*, void*, void*,
                   const void*, void*, size_t, void*);
}

namespace mnemosyne::testing {
namespace {

using proxy::emulated::Bfloat16;
using proxy::emulated::Float16;
using proxy::emulated::kBfloat16;
using proxy::emulated::kFloat16;
using proxy::emulated::kFloat32;
using proxy::emulated::numberSize;
using proxy::emulated::readNumber;
using proxy::emulated::writeNumber;

constexpr int kCompute32F = 68;

void* makeHandle() {
  void* handle = nullptr;
  CHECK(cublasCreate_v2(&handle));
  return handle;
}

// Numbers that halves hold exactly and that differ from place to place.
double sample(int seed, int64_t i) {
  return static_cast<double>((i * 37 + seed * 11) % 29 - 14) / 8;
}

// A matrix of samples on the device.
struct TestMatrix {
  int type;
  int64_t ld, columns;
  Allocation memory;

  TestMatrix(int type, int64_t ld, int64_t columns, int seed)
      : type(type), ld(ld), columns(columns), memory(ld * columns * 8) {
    for (int64_t i = 0; i < ld * columns; ++i) {
      writeNumber(type, memory.as<void>(), i, sample(seed, i));
    }
  }
  double at(int64_t row, int64_t column) const {
    return readNumber(type, memory.as<void>(), column * ld + row);
  }
};

double productAt(const TestMatrix& a, bool ta, const TestMatrix& b, bool tb,
                 int64_t i, int64_t j, int64_t k) {
  double sum = 0;
  for (int64_t p = 0; p < k; ++p) {
    sum += (ta ? a.at(p, i) : a.at(i, p)) * (tb ? b.at(j, p) : b.at(p, j));
  }
  return sum;
}

bool isNear(double a, double b, int type) {
  const double unit = type == kBfloat16  ? 1 / 128.0
                      : type == kFloat16 ? 1 / 1024.0
                                         : 1e-5;
  return std::abs(a - b) <= unit * (1 + std::abs(b));
}

}  // namespace

TEST(halves_are_rounded_to_the_nearest_even_and_keep_what_is_no_number) {
  const std::pair<float, uint16_t> halves[] = {
      {0.0f, 0},
      {-0.0f, 0x8000},
      {1.0f, 0x3c00},
      {1.00048828125f, 0x3c00},  // in the middle: to the even one
      {1.00146484375f, 0x3c02},
      {65504, 0x7bff},
      {65519, 0x7bff},
      {65520, 0x7c00},
      {-1e30f, 0xfc00},
      {0x1p-24f, 1},
      {0x1p-25f, 0},
      {0x1.8p-24f, 2},
      {0x1p-14f, 0x0400},
      {0x1.ff8p-15f, 0x03ff},
      {INFINITY, 0x7c00}};
  for (const auto& [value, bits] : halves) EXPECT_EQ(Float16(value).bits, bits);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    Float16 half;
    half.bits = static_cast<uint16_t>(bits);
    const float wide = half;
    if (std::isnan(wide)) {
      EXPECT(std::isnan(static_cast<float>(Float16(wide))));
    } else {
      EXPECT_EQ(Float16(wide).bits, half.bits);
    }
  }
  EXPECT_EQ(Bfloat16(1.00390625f).bits, 0x3f80);
  EXPECT_EQ(Bfloat16(1.01171875f).bits, 0x3f82);
  EXPECT(std::isnan(static_cast<float>(Bfloat16(NAN))));
}

TEST(products_agree_with_a_loop_in_all_types_and_transpositions) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    constexpr int m = 21, n = 13, k = 34;
    const float alpha = 0.5f, beta = 2;
    for (const int type : {kFloat32, kFloat16, kBfloat16}) {
      for (const int transposed : {0, 1, 2, 3}) {
        const bool ta = transposed & 1, tb = transposed & 2;
        const TestMatrix a(type, ta ? 40 : 25, ta ? m : k, 1);
        const TestMatrix b(type, tb ? 15 : 36, tb ? k : n, 2);
        const TestMatrix c(type, 24, n, 3), before(type, 24, n, 3);
        CHECK(cublasGemmEx(handle, ta, tb, m, n, k, &alpha, a.memory.as<void>(),
                           type, a.ld, b.memory.as<void>(), type, b.ld, &beta,
                           c.memory.as<void>(), type, c.ld, kCompute32F, -1));
        CHECK(cuCtxSynchronize());
        for (int j = 0; j < n; ++j) {
          for (int i = 0; i < 24; ++i) {
            const double want = i < m ? 0.5 * productAt(a, ta, b, tb, i, j, k) +
                                            2 * before.at(i, j)
                                      : before.at(i, j);
            EXPECT(isNear(c.at(i, j), want, type));
          }
        }
      }
    }
  });
}

TEST(a_product_does_not_read_what_a_zero_hides) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    TestMatrix a(kFloat32, 4, 4, 1), b(kFloat32, 4, 4, 2), c(kFloat32, 4, 4, 3);
    writeNumber(kFloat32, c.memory.as<void>(), 5, NAN);
    const float one = 1, zero = 0;
    CHECK(cublasSgemm_v2(handle, 0, 0, 4, 4, 4, &one, a.memory.as<float>(), 4,
                         b.memory.as<float>(), 4, &zero, c.memory.as<float>(),
                         4));
    CHECK(cuCtxSynchronize());
    EXPECT(
        isNear(c.at(1, 1), productAt(a, false, b, false, 1, 1, 4), kFloat32));
    CHECK(cublasSgemm_v2(handle, 0, 0, 4, 4, 4, &zero, nullptr, 4, nullptr, 4,
                         &zero, c.memory.as<float>(), 4));
    CHECK(cuCtxSynchronize());
    EXPECT_EQ(c.at(1, 1), 0.0);
  });
}

TEST(a_batch_gives_the_products_of_its_members) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    constexpr int m = 9, n = 5, k = 7, batches = 3;
    const TestMatrix a(1, m, k * batches, 1), b(1, k, n * batches, 2);
    const TestMatrix c(1, m, n * batches, 3);
    const double one = 1, zero = 0;
    CHECK(cublasDgemmStridedBatched(handle, 0, 0, m, n, k, &one,
                                    a.memory.as<double>(), m, m * k,
                                    b.memory.as<double>(), k, k * n, &zero,
                                    c.memory.as<double>(), m, m * n, batches));
    CHECK(cuCtxSynchronize());
    for (int batch = 0; batch < batches; ++batch) {
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int p = 0; p < k; ++p) {
          sum += a.at(2, batch * k + p) * b.at(p, batch * n + j);
        }
        EXPECT(isNear(c.at(2, batch * n + j), sum, kFloat32));
      }
    }
  });
}

TEST(factors_can_lie_in_device_memory_and_are_read_in_the_stream) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    void* stream;
    CHECK(cuStreamCreateWithPriority(&stream, 1, 0));
    CHECK(cublasSetStream_v2(handle, stream));
    CHECK(cublasSetPointerMode_v2(handle, 1));
    const TestMatrix a(kFloat32, 4, 4, 1), b(kFloat32, 4, 4, 2);
    const TestMatrix c(kFloat32, 4, 4, 3);
    Allocation factors(8);
    upload(factors.address(), std::vector<float>{7, 7});
    Gate gate(stream);
    CHECK(cuMemsetD32Async(factors.address(), 0x40000000, 1, stream));  // 2
    CHECK(cuMemsetD32Async(factors.address() + 4, 0, 1, stream));
    CHECK(cublasSgemm_v2(handle, 0, 0, 4, 4, 4, factors.as<float>(),
                         a.memory.as<float>(), 4, b.memory.as<float>(), 4,
                         factors.as<float>() + 1, c.memory.as<float>(), 4));
    gate.open();
    CHECK(cuStreamSynchronize(stream));
    EXPECT(isNear(c.at(3, 2), 2 * productAt(a, false, b, false, 3, 2, 4),
                  kFloat32));
  });
}

TEST(a_matrix_outside_of_the_memory_breaks_the_device) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    const float one = 1;
    Allocation memory(2 << 20);
    float* const end = memory.as<float>() + (2 << 18);
    CHECK(cublasSgemm_v2(handle, 0, 0, 4, 4, 4, &one, end, 4, end, 4, &one,
                         end - 4, 4));
    EXPECT_EQ(cuCtxSynchronize(), 700);
    EXPECT_EQ(cublasSgemm_v2(handle, 0, 0, 4, 4, 4, &one, end, 4, end, 4, &one,
                             end, 4),
              13);
  });
}

TEST(vectors_are_multiplied_with_their_steps) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    const TestMatrix a(kFloat32, 6, 4, 1), x(kFloat32, 12, 1, 2);
    const TestMatrix y(kFloat32, 12, 1, 3), before(kFloat32, 12, 1, 3);
    const float alpha = 2, beta = 1;
    CHECK(cublasSgemv_v2(handle, 1, 5, 4, &alpha, a.memory.as<float>(), 6,
                         x.memory.as<float>(), 2, &beta, y.memory.as<float>(),
                         3));
    CHECK(cuCtxSynchronize());
    for (int i = 0; i < 4; ++i) {
      double sum = 0;
      for (int j = 0; j < 5; ++j) sum += a.at(j, i) * x.at(2 * j, 0);
      EXPECT(isNear(y.at(3 * i, 0), 2 * sum + before.at(3 * i, 0), kFloat32));
    }
    float result = 0;
    CHECK(cublasSdot_v2(handle, 4, x.memory.as<float>(), -1,
                        before.memory.as<float>(), 2, &result));
    double want = 0;
    for (int i = 0; i < 4; ++i) want += x.at(3 - i, 0) * before.at(2 * i, 0);
    EXPECT(isNear(result, want, kFloat32));
  });
}

TEST(triangular_systems_are_solved_from_both_sides) {
  withDevice("", [] {
    openContext();
    void* const handle = makeHandle();
    constexpr int m = 4, n = 3;
    const float alpha = 2;
    for (int kind = 0; kind < 16; ++kind) {
      const int side = kind & 1, fill = kind >> 1 & 1, op = kind >> 2 & 1,
                unit = kind >> 3 & 1;
      const int size = side == 0 ? m : n;
      TestMatrix a(kFloat32, size, size, 1);
      for (int i = 0; i < size; ++i) {
        writeNumber(kFloat32, a.memory.as<void>(), i * size + i, 2 + i);
      }
      const TestMatrix x(kFloat32, m, n, 2), b(kFloat32, m, n, 2);
      CHECK(cublasStrsm_v2(handle, side, fill, op, unit, m, n, &alpha,
                           a.memory.as<float>(), size, x.memory.as<float>(),
                           m));
      CHECK(cuCtxSynchronize());
      const auto triangle = [&](int i, int j) -> double {
        if (op == 1) std::swap(i, j);
        if (i == j) return unit ? 1 : a.at(i, i);
        return (fill == 1) == (i < j) ? a.at(i, j) : 0;
      };
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
          double sum = 0;
          for (int p = 0; p < size; ++p) {
            sum += side == 0 ? triangle(i, p) * x.at(p, j)
                             : x.at(i, p) * triangle(p, j);
          }
          EXPECT(std::abs(sum - 2 * b.at(i, j)) < 1e-3);
        }
      }
    }
  });
}

namespace {

enum : uint32_t { kDefault = 1, kRelu = 2, kBias = 4, kGelu = 32, kAux = 128 };

// D = A^T B with an epilogue, in bfloat16, by cuBLASLt.
struct LtProduct {
  static constexpr int m = 10, n = 6, k = 8;
  TestMatrix a{kBfloat16, k, m, 1}, b{kBfloat16, k, n, 2};
  TestMatrix d{kBfloat16, m, n, 3}, bias{kBfloat16, m, 1, 4};
  TestMatrix aux{kBfloat16, 128, n, 5};
  void* handle = makeHandle();

  template <typename T>
  static void set(void* desc, int attribute, T value) {
    CHECK(
        cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value));
  }
  void run(uint32_t epilogue) {
    void *desc, *layout_a, *layout_b, *layout_d, *preference;
    CHECK(cublasLtMatmulDescCreate(&desc, kCompute32F, kFloat32));
    set(desc, 3, 1);
    set(desc, 7, epilogue);
    set(desc, 8, bias.memory.address());
    set(desc, 11, aux.memory.address());
    set(desc, 12, int64_t{128});
    CHECK(cublasLtMatrixLayoutCreate(&layout_a, kBfloat16, k, m, k));
    CHECK(cublasLtMatrixLayoutCreate(&layout_b, kBfloat16, k, n, k));
    CHECK(cublasLtMatrixLayoutCreate(&layout_d, kBfloat16, m, n, m));
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    proxy::LtHeuristicResult result;
    int num_results = 0;
    CHECK(cublasLtMatmulAlgoGetHeuristic(handle, desc, layout_a, layout_b,
                                         layout_d, layout_d, preference, 1,
                                         &result, &num_results));
    EXPECT_EQ(num_results, 1);
    const float one = 1, zero = 0;
    CHECK(cublasLtMatmul(handle, desc, &one, a.memory.as<void>(), layout_a,
                         b.memory.as<void>(), layout_b, &zero,
                         d.memory.as<void>(), layout_d, d.memory.as<void>(),
                         layout_d, result.algorithm, nullptr, 0, nullptr));
    CHECK(cublasLtMatmulDescDestroy(desc));
    for (void* layout : {layout_a, layout_b, layout_d}) {
      CHECK(cublasLtMatrixLayoutDestroy(layout));
    }
    CHECK(cublasLtMatmulPreferenceDestroy(preference));
    CHECK(cuCtxSynchronize());
  }
  double plain(int i, int j) const {
    return productAt(a, true, b, false, i, j, k);
  }
};

double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(0.79788456 * (x + 0.044715 * x * x * x)));
}

}  // namespace

TEST(an_epilogue_adds_the_bias_and_bends_the_result) {
  withDevice("", [] {
    openContext();
    LtProduct product;
    const auto expectAll = [&](uint32_t epilogue, auto&& want) {
      product.run(epilogue);
      for (int i = 0; i < LtProduct::m; ++i) {
        for (int j = 0; j < LtProduct::n; ++j) {
          EXPECT(isNear(product.d.at(i, j), want(i, j), kBfloat16));
        }
      }
    };
    const auto biased = [&](int i, int j) {
      return product.plain(i, j) + product.bias.at(i, 0);
    };
    expectAll(kDefault, [&](int i, int j) { return product.plain(i, j); });
    expectAll(kBias, biased);
    expectAll(kRelu | kBias,
              [&](int i, int j) { return std::max(0.0, biased(i, j)); });
    expectAll(kGelu | kBias, [&](int i, int j) { return gelu(biased(i, j)); });
    expectAll(kGelu | kAux | kBias,
              [&](int i, int j) { return gelu(biased(i, j)); });
    EXPECT(isNear(product.aux.at(3, 2), biased(3, 2), kBfloat16));
  });
}

TEST(the_gradients_of_an_epilogue_use_what_it_kept) {
  withDevice("", [] {
    openContext();
    LtProduct product;
    product.run(kRelu | kAux);
    std::vector<bool> passed;
    for (int i = 0; i < LtProduct::m * LtProduct::n; ++i) {
      passed.push_back(product.d.at(i % LtProduct::m, i / LtProduct::m) > 0);
    }
    product.run(8 | kAux | 16);  // DRELU_BGRAD
    for (int i = 0; i < LtProduct::m; ++i) {
      double sum = 0;
      for (int j = 0; j < LtProduct::n; ++j) {
        const double want =
            passed[j * LtProduct::m + i] ? product.plain(i, j) : 0;
        EXPECT(isNear(product.d.at(i, j), want, kBfloat16));
        sum += want;
      }
      EXPECT(isNear(product.bias.at(i, 0), sum, kBfloat16));
    }
    product.run(kGelu | kAux);
    product.run(64 | kAux);  // DGELU
    const double x = product.aux.at(4, 1), step = 1e-4;
    const double slope = (gelu(x + step) - gelu(x - step)) / (2 * step);
    EXPECT(isNear(product.d.at(4, 1), product.plain(4, 1) * slope, kBfloat16));
    product.run(256);  // BGRADA
    double sum = 0;
    for (int p = 0; p < LtProduct::k; ++p) sum += product.a.at(p, 7);
    EXPECT(isNear(product.bias.at(7, 0), sum, kBfloat16));
  });
}

}  // namespace mnemosyne::testing
