// Device code with damage: a table, or a FatBinaryError; never a crash, nor
// memory beyond what the bytes can be worth.
//
// MNEMOSYNE_FUZZ_S says for how long, MNEMOSYNE_FUZZ_SEED with what to start;
// a failure tells the seed of its round.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

#include "fat_binary_writer.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

using proxy::FatBinary;
using proxy::FatBinaryError;

long fromEnvironment(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atol(text) : otherwise;
}

const std::string kPtx = R"ptx(
.version 9.0
.target sm_80
.extern .global .align 4 .u32 elsewhere;
.global .attribute(.managed) .align 8 .b8 matrix[3][8] = {1, 2, 3};
.func (.param .b32 result) helper(.param .u64 .ptr .global .align 4 x)
{ .param .u64 local; ret; }
.visible .entry first(.param .u32 a, .param .align 64 .b8 b[128], // comment
  .param .u64 .ptr .const .align 16 c) .maxntid 128, 1, 1 { ret; } /* and */
.entry second() { ret; }
)ptx";

class Damager {
 public:
  explicit Damager(unsigned seed) : random_(seed) {}

  uint64_t below(uint64_t limit) { return random_() % limit; }
  bool oneIn(uint64_t n) { return below(n) == 0; }

  Bytes damaged(Bytes bytes) {
    for (uint64_t n = below(5); n > 0 && !bytes.empty(); --n) damage(&bytes);
    return bytes;
  }

 private:
  void damage(Bytes* bytes) {
    const size_t at = below(bytes->size());
    const auto here = bytes->begin() + static_cast<std::ptrdiff_t>(at);
    const auto end = here + static_cast<std::ptrdiff_t>(std::min<size_t>(
                                1 + below(60), bytes->size() - at));
    switch (below(7)) {
      case 0:
        *here ^= static_cast<std::byte>(1 << below(8));
        return;
      case 1:
        *here = static_cast<std::byte>(random_());
        return;
      case 2:
        return putNumber(bytes, at);
      case 3:
        bytes->erase(here, end);
        return;
      case 4: {
        const Bytes again(here, end);
        bytes->insert(here, again.begin(), again.end());
        return;
      }
      case 5:
        std::copy(here, end, bytes->begin());
        return;
      case 6:
        if (oneIn(4)) bytes->resize(at);
        return;
    }
  }

  // One that counts something, more often than not.
  void putNumber(Bytes* bytes, size_t at) {
    const std::array<uint64_t, 10> usual = {
        0,     1,          64,         0x7fffffff, 0xffffffff,
        ~0ull, ~0ull - 63, 1ull << 32, 1ull << 62, bytes->size(),
    };
    const uint64_t value =
        oneIn(3) ? below(2 * bytes->size()) : usual[below(usual.size())];
    const size_t size = std::min<size_t>(1u << below(4), bytes->size());
    at = std::min(at / size * size, bytes->size() - size);
    std::memcpy(bytes->data() + at, &value, size);
  }

  std::mt19937 random_;
};

// What nvcc has made, and what we make, of each kind.
struct Samples {
  std::vector<Bytes> cubins, texts, fat_binaries;

  Samples() {
    cubins.push_back(CubinWriter()
                         .kernel("first", {{0, 4}, {8, 8}, {16, 3}})
                         .kernel("second", {{0, 20'000}, {20'000, 8}}, true)
                         .kernel("third", {})
                         .variable("history", 140)
                         .build());
    texts.push_back(bytesOf(kPtx));
#ifdef MNEMOSYNE_DEVICE_CODE
    for (const char* name : {"plain.fatbin", "lz4.fatbin", "zstd.fatbin"}) {
      fat_binaries.push_back(read(name));
    }
    texts.push_back(read("layouts.ptx"));
    // Behind its headers; the text behind the cubin does no harm.
    const Bytes& plain = fat_binaries[0];
    const Bytes magic = bytesOf("\177ELF");
    const auto cubin =
        std::search(plain.begin(), plain.end(), magic.begin(), magic.end());
    EXPECT(cubin != plain.end());
    cubins.emplace_back(cubin, plain.end());
#endif
  }

 private:
#ifdef MNEMOSYNE_DEVICE_CODE
  static Bytes read(const std::string& name) {
    std::ifstream file(MNEMOSYNE_DEVICE_CODE "/" + name, std::ios::binary);
    EXPECT(file.good());
    return bytesOf({std::istreambuf_iterator<char>(file), {}});
  }
#endif
};

// Damage inside of what is packed, or outside, or both.
Bytes made(const Samples& samples, Damager* damager) {
  if (!samples.fat_binaries.empty() && damager->oneIn(3)) {
    const auto& all = samples.fat_binaries;
    return damager->damaged(all[damager->below(all.size())]);
  }
  const Bytes& cubin = samples.cubins[damager->below(samples.cubins.size())];
  const Bytes& text = samples.texts[damager->below(samples.texts.size())];
  if (damager->oneIn(3)) {
    return damager->damaged(damager->oneIn(2) ? cubin : text);
  }
  const auto packing = static_cast<Packing>(damager->below(3));
  const Bytes code = FatBinaryWriter()
                         .image(2, 90, damager->damaged(cubin), packing, 0)
                         .image(1, 80, damager->damaged(text), packing, 0)
                         .build();
  return damager->oneIn(3) ? damager->damaged(code) : code;
}

// Whether it was a table, and then one that can be relied on.
bool isRead(const Bytes& code, int compute_capability) {
  try {
    const auto table = FatBinary::in(code).kernels(compute_capability);
    for (const auto& [name, layout] : table.kernels) {
      EXPECT(layout.size_bytes <= 0xffff);
      for (const auto& [offset, size_bytes] : layout.parameters) {
        EXPECT(offset <= layout.size_bytes);
        EXPECT(size_bytes <= layout.size_bytes - offset);
      }
    }
    return true;
  } catch (const FatBinaryError&) {
    return false;
  }
}

}  // namespace

TEST(damaged_device_code_is_a_sound_table_or_an_error) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() +
                   std::chrono::seconds(fromEnvironment("MNEMOSYNE_FUZZ_S", 3));
  auto seed = static_cast<unsigned>(fromEnvironment("MNEMOSYNE_FUZZ_SEED", 1));
  const Samples samples;
  int num_tables = 0;
  int rounds = 0;
  for (; Clock::now() < end || rounds == 0; ++seed, ++rounds) {
    Damager damager(seed);
    try {
      const Bytes code = made(samples, &damager);
      num_tables += isRead(code, 80);
      num_tables += isRead(code, 90);
    } catch (const std::exception& error) {
      throw std::runtime_error("seed " + std::to_string(seed) + ": " +
                               error.what());
    }
  }
  rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  std::cout << "      " << rounds << " rounds, " << num_tables << " tables, "
            << usage.ru_maxrss / 1024 << " MiB" << std::endl;
  EXPECT(usage.ru_maxrss < 1 << 20);  // KiB
}

}  // namespace mnemosyne::testing
