#include "common/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace mnemosyne {
namespace {

// Fractional parts of the cube roots of the first 64 primes (FIPS
// 180-4, 4.2.2).
constexpr std::array<uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr size_t kBlock = 64;

uint32_t loadBigEndian(const std::byte* data) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i)
    value = value << 8 | static_cast<uint8_t>(data[i]);
  return value;
}

template <typename T>
void storeBigEndian(T value, std::byte* data) {
  for (size_t i = 0; i < sizeof(T); ++i)
    data[i] = static_cast<std::byte>(value >> (8 * (sizeof(T) - 1 - i)));
}

}  // namespace

Sha256::Sha256()
    : state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19} {}

void Sha256::block(const std::byte* data) {
  std::array<uint32_t, 64> w;
  for (int i = 0; i < 16; ++i) w[i] = loadBigEndian(data + 4 * i);
  for (int i = 16; i < 64; ++i) {
    const uint32_t s0 =
        std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
    const uint32_t s1 =
        std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (int i = 0; i < 64; ++i) {
    const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const std::array<uint32_t, 8> mixed = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state_[i] += mixed[i];
}

Sha256& Sha256::update(Bytes data) {
  while (!data.empty()) {
    const size_t used = length_ % kBlock;
    const size_t n = std::min(kBlock - used, data.size());
    std::memcpy(buffer_.data() + used, data.data(), n);
    length_ += n;
    data = data.subspan(n);
    if (length_ % kBlock == 0) block(buffer_.data());
  }
  return *this;
}

Digest Sha256::finish() {
  const uint64_t bits = length_ * 8;
  const std::byte one{0x80};
  const std::byte zero{0};
  update({&one, 1});
  while (length_ % kBlock != kBlock - 8) update({&zero, 1});
  std::array<std::byte, 8> tail;
  storeBigEndian(bits, tail.data());
  update(tail);
  Digest digest;
  for (int i = 0; i < 8; ++i) storeBigEndian(state_[i], digest.data() + 4 * i);
  return digest;
}

Digest sha256(Bytes data) { return Sha256().update(data).finish(); }

Digest hmacSha256(Bytes key, Bytes data) {
  std::array<std::byte, kBlock> padded{};
  if (key.size() > kBlock) {
    const Digest digest = sha256(key);
    std::copy(digest.begin(), digest.end(), padded.begin());
  } else {
    std::copy(key.begin(), key.end(), padded.begin());
  }
  auto inner = padded;
  auto outer = padded;
  for (auto& byte : inner) byte ^= std::byte{0x36};
  for (auto& byte : outer) byte ^= std::byte{0x5c};
  const Digest digest = Sha256().update(inner).update(data).finish();
  return Sha256().update(outer).update(digest).finish();
}

bool equalDigests(const Digest& a, const Digest& b) {
  std::byte difference{0};
  for (size_t i = 0; i < a.size(); ++i) difference |= a[i] ^ b[i];
  return difference == std::byte{0};
}

}  // namespace mnemosyne
