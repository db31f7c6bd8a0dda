#include "proxy/address_space.h"

#include <iterator>

namespace mnemosyne::proxy {

std::optional<Block> AddressSpace::allocate(uint64_t size_bytes) {
  if (size_bytes > end_ - begin_) return std::nullopt;
  const uint64_t pieces =
      size_bytes == 0 ? 1 : (size_bytes - 1) / granularity_ + 1;
  const uint64_t size = pieces * granularity_;
  std::lock_guard<std::mutex> lock(mutex_);
  uint64_t at = begin_;
  for (const auto& [address, used] : sizes_) {
    if (address - at >= size) break;
    at = address + used;
  }
  if (end_ - at < size) return std::nullopt;
  sizes_.emplace(at, size);
  return Block{at, size};
}

std::optional<Block> AddressSpace::release(uint64_t address) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sizes_.find(address);
  if (found == sizes_.end()) return std::nullopt;
  const Block block{found->first, found->second};
  sizes_.erase(found);
  return block;
}

std::optional<Block> AddressSpace::find(uint64_t address) const {
  if (!inRange(address)) return std::nullopt;
  std::lock_guard<std::mutex> lock(mutex_);
  auto after = sizes_.upper_bound(address);
  if (after == sizes_.begin()) return std::nullopt;
  const auto& [begin, size] = *std::prev(after);
  if (address - begin >= size) return std::nullopt;
  return Block{begin, size};
}

std::vector<Block> AddressSpace::blocks() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Block> all;
  for (const auto& [address, size] : sizes_) all.push_back({address, size});
  return all;
}

}  // namespace mnemosyne::proxy
