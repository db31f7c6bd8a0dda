// SHA-256 (FIPS 180-4) and HMAC-SHA256 (RFC 2104).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace mnemosyne {

using Bytes = std::span<const std::byte>;
using Digest = std::array<std::byte, 32>;

class Sha256 {
 public:
  Sha256();
  Sha256& update(Bytes data);
  Digest finish();

 private:
  void block(const std::byte* data);

  std::array<uint32_t, 8> state_;
  std::array<std::byte, 64> buffer_;
  uint64_t length_ = 0;
};

Digest sha256(Bytes data);
Digest hmacSha256(Bytes key, Bytes data);

// Compares in a time that does not depend on where they differ.
bool equalDigests(const Digest& a, const Digest& b);

}  // namespace mnemosyne
