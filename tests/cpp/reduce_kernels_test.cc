#include "ccl/reduce_kernels.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "reduce_reference.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

using namespace ccl;  // NOLINT: tests only
using Bytes = std::vector<std::byte>;

constexpr DataType kRealTypes[] = {DataType::kBool,    DataType::kInt8,
                                   DataType::kUint8,   DataType::kInt16,
                                   DataType::kInt32,   DataType::kInt64,
                                   DataType::kFloat16, DataType::kBfloat16,
                                   DataType::kFloat32, DataType::kFloat64};
constexpr ReduceOp kOps[] = {
    ReduceOp::kSum, ReduceOp::kAverage, ReduceOp::kProduct, ReduceOp::kMin,
    ReduceOp::kMax, ReduceOp::kBitAnd,  ReduceOp::kBitOr,   ReduceOp::kBitXor};

// Exponent and mantissa of each floating-point type, to make what random bits
// hardly ever are: zeros, subnormals, infinities, NaNs, close neighbours.
int mantissaBits(DataType type) {
  switch (type) {
    case DataType::kFloat16:
      return 10;
    case DataType::kBfloat16:
      return 7;
    case DataType::kFloat32:
      return 23;
    case DataType::kFloat64:
      return 52;
    default:
      return 4;  // integers: something near zero or near the limits
  }
}

Bytes randomNumbers(DataType type, size_t count, std::mt19937_64& random) {
  const size_t size = elementBytes(type);
  const int mantissa = mantissaBits(type);
  const uint64_t exponents = ~uint64_t{0} >> (64 - 8 * size + 1 + mantissa);
  Bytes bytes(count * size);
  for (size_t i = 0; i < count; ++i) {
    uint64_t bits = random();
    const uint64_t kind = random() % 4;
    const uint64_t middle = exponents / 2 + random() % 3;
    if (kind < 3) {
      const uint64_t exponent = kind == 0   ? 0          // subnormal
                                : kind == 1 ? exponents  // infinite or NaN
                                            : middle;
      bits &= ~(exponents << mantissa);
      bits |= exponent << mantissa;
      if (random() % 4 == 0) bits &= ~((uint64_t{1} << mantissa) - 1);
    }
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
  return bytes;
}

// Numbers that start at any address, between bytes that nobody may touch.
class Unaligned {
 public:
  Unaligned(const Bytes& numbers, std::mt19937_64& random)
      : start_(kGuard + random() % 64), size_(numbers.size()) {
    all_.assign(start_ + size_ + kGuard, kUntouched);
    std::copy(numbers.begin(), numbers.end(), data());
  }
  std::byte* data() { return all_.data() + start_; }
  bool holds(const Bytes& numbers) const {
    for (size_t i = 0; i < all_.size(); ++i) {
      const bool inside = i >= start_ && i < start_ + size_;
      if (all_[i] != (inside ? numbers[i - start_] : kUntouched)) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr std::byte kUntouched{0xa5};
  size_t start_;
  size_t size_;
  Bytes all_;
};

void require(bool holds, const char* what, DataType type, ReduceOp op,
             size_t path, size_t count) {
  if (holds) return;
  std::ostringstream text;
  text << what << ": type=" << static_cast<int>(type)
       << " op=" << static_cast<int>(op) << " path=" << path
       << " count=" << count;
  throw std::runtime_error(text.str());
}

}  // namespace

TEST(every_path_gives_the_same_bits_at_any_length_address_and_aliasing) {
  std::mt19937_64 random(1);
  for (DataType type : kRealTypes) {
    for (ReduceOp op : kOps) {
      if (!canReduce(type, op)) continue;
      for (size_t count = 0; count <= 200; ++count) {
        const Bytes a = randomNumbers(type, count, random);
        const Bytes b = randomNumbers(type, count, random);
        Bytes want(a.size());
        referenceReduce(type, op, want.data(), a.data(), b.data(), a.size());
        for (size_t path = 0; path < runnableKernels().size(); ++path) {
          const auto run = runnableKernels()[path]->reduce;
          Unaligned x(a, random), y(b, random), apart(b, random);
          run(type, op, apart.data(), x.data(), y.data(), a.size());
          require(apart.holds(want) && x.holds(a) && y.holds(b), "apart", type,
                  op, path, count);
          Unaligned left = x, right = y;
          run(type, op, left.data(), left.data(), y.data(), a.size());
          require(left.holds(want), "out is a", type, op, path, count);
          run(type, op, right.data(), x.data(), right.data(), a.size());
          require(right.holds(want), "out is b", type, op, path, count);
        }
      }
    }
  }
}

TEST(every_half_meets_every_kind_of_half_with_the_same_bits_on_every_path) {
  std::mt19937_64 random(2);
  constexpr size_t kHalves = 1 << 16;
  Bytes all(2 * kHalves);
  for (size_t i = 0; i < kHalves; ++i) std::memcpy(&all[2 * i], &i, 2);
  for (DataType type : {DataType::kFloat16, DataType::kBfloat16}) {
    const Bytes others = randomNumbers(type, 100, random);
    for (size_t i = 0; i < others.size(); i += 2) {
      Bytes same(all.size());
      for (size_t j = 0; j < same.size(); j += 2)
        std::memcpy(&same[j], &others[i], 2);
      for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin,
                          ReduceOp::kMax}) {
        for (const auto& [a, b] :
             {std::pair(all.data(), same.data()), {same.data(), all.data()}}) {
          Bytes want(all.size()), got(all.size());
          referenceReduce(type, op, want.data(), a, b, all.size());
          for (size_t path = 0; path < runnableKernels().size(); ++path) {
            runnableKernels()[path]->reduce(type, op, got.data(), a, b,
                                            all.size());
            require(got == want, "halves", type, op, path, i / 2);
          }
        }
      }
    }
  }
}

TEST(every_path_divides_into_the_same_bits) {
  std::mt19937_64 random(3);
  for (DataType type : kRealTypes) {
    if (type == DataType::kBool) continue;
    for (int divisor : {1, 2, 3, 7, 8, 1000, 16384, 0x7fffffff}) {
      for (size_t count : {0, 1, 2, 15, 16, 17, 33, 1000}) {
        const Bytes numbers = randomNumbers(type, count, random);
        Bytes want = numbers;
        referenceDivide(type, want.data(), divisor, want.size());
        for (size_t path = 0; path < runnableKernels().size(); ++path) {
          Unaligned got(numbers, random);
          runnableKernels()[path]->divide(type, got.data(), divisor,
                                          numbers.size());
          require(got.holds(want), "divide", type, ReduceOp::kAverage, path,
                  count);
        }
      }
    }
  }
}

TEST(many_inputs_are_combined_like_a_chain_into_any_of_them) {
  std::mt19937_64 random(4);
  constexpr int kMost = 5;
  for (DataType type : kRealTypes) {
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax}) {
      // Less than a block, and some blocks and a piece.
      for (size_t size : {0, 208, 3 * 8192 + 208}) {
        for (int count = 1; count <= kMost; ++count) {
          std::vector<Bytes> numbers;
          for (int i = 0; i < count; ++i)
            numbers.push_back(
                randomNumbers(type, size / elementBytes(type), random));
          Bytes want = numbers[0];
          for (int i = 1; i < count; ++i)
            referenceReduce(type, op, want.data(), want.data(),
                            numbers[i].data(), want.size());
          for (int target = 0; target <= count; ++target) {
            std::vector<Unaligned> buffers;
            for (const Bytes& some : numbers)
              buffers.emplace_back(some, random);
            buffers.emplace_back(numbers[0], random);
            std::vector<const void*> inputs;
            for (int i = 0; i < count; ++i) inputs.push_back(buffers[i].data());
            reduceMany(type, op, buffers[target].data(), inputs.data(), count,
                       want.size());
            require(buffers[target].holds(want), "many", type, op, target,
                    count);
            for (int i = 0; i < count; ++i)
              require(i == target || buffers[i].holds(numbers[i]), "input",
                      type, op, i, count);
          }
        }
      }
    }
  }
}

}  // namespace mnemosyne::testing
