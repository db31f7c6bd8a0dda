// Reading of bytes that nobody has checked: what lies outside of them throws.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>

#include "proxy/fat_binary.h"

namespace mnemosyne::proxy {

class ByteView {
 public:
  explicit ByteView(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  T get(uint64_t offset) const {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, slice(offset, sizeof value).data(), sizeof value);
    return value;
  }

  std::span<const std::byte> slice(uint64_t offset, uint64_t size) const {
    if (offset > bytes_.size() || size > bytes_.size() - offset) {
      throw FatBinaryError("device code is cut short");
    }
    return bytes_.subspan(offset, size);
  }

  bool startsWith(uint64_t offset, std::string_view text) const {
    return offset <= bytes_.size() && text.size() <= bytes_.size() - offset &&
           std::memcmp(bytes_.data() + offset, text.data(), text.size()) == 0;
  }

  // The text from here to the zero behind it.
  std::string_view text(uint64_t offset) const {
    const auto rest = slice(offset, size() - std::min(size(), offset));
    const void* end = std::memchr(rest.data(), 0, rest.size());
    if (end == nullptr) throw FatBinaryError("a name in device code is open");
    const auto* begin = reinterpret_cast<const char*>(rest.data());
    return {begin, static_cast<const char*>(end)};
  }

  uint64_t size() const { return bytes_.size(); }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace mnemosyne::proxy
