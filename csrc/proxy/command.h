// One forwarded call: its number and its arguments, one behind the other.
//
//   CommandWriter command(opcode);       in the client
//   command.put(stream_id).put(count).putBytes(data, size);
//
//   CommandReader reader(payload);       in the server
//   auto stream_id = reader.get<uint32_t>();
//
// Values are copied as they are in memory (both sides are one build on one
// machine), without alignment. A reader that runs over the end throws
// ProtocolError, so that a broken client never makes the server read beyond.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <type_traits>

namespace mnemosyne::proxy {

// Kernel parameters may have 32,764 bytes, so a command has room for them.
constexpr size_t kMaxPayloadBytes = 33 * 1024;

class ProtocolError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class CommandWriter {
 public:
  explicit CommandWriter(uint16_t opcode) : opcode_(opcode) {}

  template <typename T>
  CommandWriter& put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    return putRaw(&value, sizeof value);
  }

  // The size, then the bytes.
  CommandWriter& putBytes(const void* data, size_t size_bytes) {
    put(static_cast<uint32_t>(size_bytes));
    return putRaw(data, size_bytes);
  }

  // A whole payload, as another writer made it.
  CommandWriter& putAll(std::span<const std::byte> payload) {
    return putRaw(payload.data(), payload.size());
  }

  // Room for `size_bytes`, zeroed, which the caller fills.
  std::byte* reserve(size_t size_bytes) {
    checkRoom(size_bytes);
    std::byte* at = payload_.data() + size_;
    std::memset(at, 0, size_bytes);
    size_ += size_bytes;
    return at;
  }

  uint16_t opcode() const { return opcode_; }
  std::span<const std::byte> payload() const {
    return {payload_.data(), size_};
  }

 private:
  CommandWriter& putRaw(const void* data, size_t size_bytes) {
    checkRoom(size_bytes);
    if (size_bytes > 0) std::memcpy(payload_.data() + size_, data, size_bytes);
    size_ += size_bytes;
    return *this;
  }
  void checkRoom(size_t size_bytes) const {
    if (size_bytes > payload_.size() - size_) {
      throw ProtocolError("a command is larger than a slot of the ring");
    }
  }

  uint16_t opcode_;
  size_t size_ = 0;
  std::array<std::byte, kMaxPayloadBytes> payload_;  // not initialised
};

class CommandReader {
 public:
  explicit CommandReader(std::span<const std::byte> payload) : rest_(payload) {}

  template <typename T>
  T get() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }

  std::span<const std::byte> getBytes() { return take(get<uint32_t>()); }
  std::span<const std::byte> take(size_t size_bytes) {
    if (size_bytes > rest_.size())
      throw ProtocolError("a command is cut short");
    const auto taken = rest_.first(size_bytes);
    rest_ = rest_.subspan(size_bytes);
    return taken;
  }
  bool atEnd() const { return rest_.empty(); }

 private:
  std::span<const std::byte> rest_;
};

}  // namespace mnemosyne::proxy
