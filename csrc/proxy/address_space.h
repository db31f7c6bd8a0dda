// Which parts of a range of addresses are in use. It gives the lowest place
// that fits, so equal requests in equal order get equal addresses.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

namespace mnemosyne::proxy {

struct Block {
  uint64_t address;
  uint64_t size_bytes;  // a multiple of the granularity
};

class AddressSpace {
 public:
  AddressSpace(uint64_t begin, uint64_t end, uint64_t granularity)
      : begin_(begin), end_(end), granularity_(granularity) {}

  // At least one byte. Nothing if no gap is large enough.
  std::optional<Block> allocate(uint64_t size_bytes);
  // The block that begins at `address`; nothing if none does.
  std::optional<Block> release(uint64_t address);
  // The block that holds `address`.
  std::optional<Block> find(uint64_t address) const;
  std::vector<Block> blocks() const;
  bool inRange(uint64_t address) const {
    return address >= begin_ && address < end_;
  }

 private:
  const uint64_t begin_, end_, granularity_;
  mutable std::mutex mutex_;
  std::map<uint64_t, uint64_t> sizes_;  // of the blocks in use, by address
};

}  // namespace mnemosyne::proxy
