#include "ccl/reduce_ops.h"

#include <bit>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "test.h"

namespace mnemosyne::testing {
namespace {

using namespace ccl;  // NOLINT: tests only

template <typename T>
T combine(DataType type, ReduceOp op, T a, T b) {
  T out{};
  reduce(type, op, &out, &a, &b, sizeof(T));
  return out;
}

uint16_t half(DataType type, ReduceOp op, uint16_t a, uint16_t b) {
  return combine<uint16_t>(type, op, a, b);
}

constexpr uint16_t kHalfOne = 0x3c00;
constexpr uint16_t kHalfMax = 0x7bff;
constexpr uint16_t kHalfInfinity = 0x7c00;

}  // namespace

// x * 1 widens and rounds: it must be the identity for every value that is no
// NaN.
TEST(every_half_survives_widening_and_rounding) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto x = static_cast<uint16_t>(bits);
    const bool nan16 = (x & 0x7fff) > kHalfInfinity;
    const bool nan_brain = (x & 0x7fff) > 0x7f80;
    if (!nan16)
      EXPECT_EQ(half(DataType::kFloat16, ReduceOp::kProduct, x, kHalfOne), x);
    if (!nan_brain)
      EXPECT_EQ(half(DataType::kBfloat16, ReduceOp::kProduct, x, 0x3f80), x);
  }
}

TEST(halves_round_to_the_nearest_even) {
  const auto add = [](uint16_t a, uint16_t b) {
    return half(DataType::kFloat16, ReduceOp::kSum, a, b);
  };
  EXPECT_EQ(add(kHalfOne, 0x1000), kHalfOne);  // 1 + 2^-11: a tie, down
  EXPECT_EQ(add(0x3c01, 0x1000), 0x3c02);      // a tie, up
  EXPECT_EQ(add(kHalfOne, 0x1001), 0x3c01);    // above the tie
  EXPECT_EQ(add(kHalfMax, kHalfMax), kHalfInfinity);
  EXPECT_EQ(add(kHalfMax, 0x4c00), kHalfInfinity);  // 65504 + 16: a tie, up
  EXPECT_EQ(add(kHalfMax, 0x4b00), kHalfMax);       // 65504 + 14
  EXPECT_EQ(add(1, 1), 2);                          // subnormals
  EXPECT_EQ(add(0x03ff, 1), 0x0400);                // to the first normal
  const auto multiply = [](uint16_t a, uint16_t b) {
    return half(DataType::kFloat16, ReduceOp::kProduct, a, b);
  };
  EXPECT_EQ(multiply(1, 0x3800), 0);  // 2^-24 / 2: a tie, to zero
  EXPECT_EQ(multiply(3, 0x3800), 2);  // 1.5 units: a tie, to even
  EXPECT((add(0x7e00, kHalfOne) & 0x7fff) > kHalfInfinity);  // NaN stays NaN
  EXPECT_EQ(half(DataType::kBfloat16, ReduceOp::kSum, 0x3f80, 0x3b80), 0x3f80);
  EXPECT_EQ(half(DataType::kBfloat16, ReduceOp::kSum, 0x3f81, 0x3b80), 0x3f82);
}

TEST(a_nan_wins_every_comparison) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax}) {
    EXPECT(std::isnan(combine(DataType::kFloat32, op, nan, 1.0f)));
    EXPECT(std::isnan(combine(DataType::kFloat32, op, 1.0f, nan)));
  }
  EXPECT_EQ(combine(DataType::kFloat32, ReduceOp::kMin, 2.0f, 1.0f), 1.0f);
  EXPECT_EQ(combine(DataType::kFloat64, ReduceOp::kMax, 2.0, 1.0), 2.0);
}

TEST(the_first_of_two_nans_wins_sums_and_the_second_comparisons) {
  const auto bits = [](ReduceOp op, uint32_t a, uint32_t b) {
    return combine<uint32_t>(DataType::kFloat32, op, a, b);
  };
  constexpr uint32_t kOne = 0x3f800000;
  for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kProduct}) {
    EXPECT_EQ(bits(op, 0x7fc00001, 0xffc00002), 0x7fc00001u);
    EXPECT_EQ(bits(op, 0xffc00002, 0x7fc00001), 0xffc00002u);
    EXPECT_EQ(bits(op, 0x7f800001, kOne), 0x7fc00001u);  // made quiet
    EXPECT_EQ(bits(op, kOne, 0xff800001), 0xffc00001u);
    EXPECT_EQ(half(DataType::kFloat16, op, 0x7c01, 0xfe02), 0x7e01);
    EXPECT_EQ(half(DataType::kBfloat16, op, 0x7f81, 0xffc2), 0x7fc1);
  }
  for (ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax}) {
    EXPECT_EQ(bits(op, 0x7fc00001, 0xffc00002), 0xffc00002u);
    EXPECT_EQ(bits(op, 0x7f800001, kOne), 0x7f800001u);  // only moved
    EXPECT_EQ(half(DataType::kFloat16, op, 0x7c01, kHalfOne), 0x7e01);
    EXPECT_EQ(half(DataType::kBfloat16, op, 0x3f80, 0xff81), 0xffc1);
    EXPECT_EQ(bits(op, 0x80000000, 0), 0x80000000u);  // equal: the first
    EXPECT_EQ(bits(op, 0, 0x80000000), 0u);
    EXPECT_EQ(half(DataType::kFloat16, op, 0x8000, 0), 0x8000);
  }
}

TEST(complex_numbers_are_multiplied_as_such_and_added_by_parts) {
  using Complex = std::complex<double>;
  const Complex a(1, 2), b(3, -4);
  const DataType type = DataType::kComplex128;
  EXPECT_EQ(combine(type, ReduceOp::kProduct, a, b), Complex(11, 2));
  EXPECT_EQ(combine(type, ReduceOp::kSum, a, b), Complex(4, -2));
  std::vector<std::complex<float>> values = {{2, 4}, {-6, 8}};
  divide(DataType::kComplex64, values.data(), 2, 16);
  EXPECT_EQ(values[0], std::complex<float>(1, 2));
  EXPECT_EQ(values[1], std::complex<float>(-3, 4));
}

TEST(integers_wrap_and_averages_round_to_zero) {
  EXPECT_EQ(combine<int32_t>(DataType::kInt32, ReduceOp::kSum, INT32_MAX, 1),
            INT32_MIN);
  EXPECT_EQ(combine<int8_t>(DataType::kInt8, ReduceOp::kProduct, 100, 3), 44);
  EXPECT_EQ(combine<int64_t>(DataType::kInt64, ReduceOp::kBitXor, 6, 3), 5);
  std::vector<int64_t> values = {-7, 7};
  divide(DataType::kInt64, values.data(), 2, 16);
  EXPECT_EQ(values[0], -3);
  EXPECT_EQ(values[1], 3);
  EXPECT_EQ(combine(DataType::kBool, ReduceOp::kSum, true, true), true);
  EXPECT_EQ(combine(DataType::kBool, ReduceOp::kProduct, true, false), false);
  EXPECT_EQ(combine<uint8_t>(DataType::kBool, ReduceOp::kBitAnd, 2, 1), 1);
}

TEST(empty_buffers_may_be_null) {
  const void* inputs[] = {nullptr, nullptr, nullptr};
  for (int count = 1; count <= 3; ++count)
    reduceMany(DataType::kFloat32, ReduceOp::kSum, nullptr, inputs, count, 0);
  reduce(DataType::kBfloat16, ReduceOp::kSum, nullptr, nullptr, nullptr, 0);
  divide(DataType::kFloat16, nullptr, 2, 0);
}

TEST(reductions_without_a_meaning_are_refused) {
  EXPECT(!canReduce(DataType::kComplex64, ReduceOp::kMax));
  EXPECT(!canReduce(DataType::kFloat32, ReduceOp::kBitAnd));
  EXPECT(!canReduce(DataType::kBytes, ReduceOp::kSum));
  EXPECT(canReduce(DataType::kComplex128, ReduceOp::kProduct));
  float x = 1;
  EXPECT_THROWS(std::logic_error, reduce(DataType::kFloat32, ReduceOp::kBitAnd,
                                         &x, &x, &x, sizeof(x)));
  EXPECT_THROWS(std::logic_error,
                reduce(DataType::kBytes, ReduceOp::kSum, &x, &x, &x, 4));
}

}  // namespace mnemosyne::testing
