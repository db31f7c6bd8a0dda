// Unpacks what fatbinary packed: Zstandard by default, LZ4 for speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace mnemosyne::proxy {

constexpr uint64_t kMaxUnpackedBytes = uint64_t{1} << 30;

// Memory that is not cleared first: cubins have megabytes.
class UnpackedBytes {
 public:
  explicit UnpackedBytes(size_t size)
      : data_(std::make_unique_for_overwrite<std::byte[]>(size)), size_(size) {}
  std::byte* data() { return data_.get(); }
  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }

 private:
  std::unique_ptr<std::byte[]> data_;
  size_t size_;
};

// Both throw FatBinaryError unless the result has exactly `size_bytes`.

// By libzstd.so.1, which is loaded when first needed.
UnpackedBytes unpackZstd(std::span<const std::byte> packed,
                         uint64_t size_bytes);
// One block, without a frame around it.
UnpackedBytes unpackLz4(std::span<const std::byte> packed, uint64_t size_bytes);

}  // namespace mnemosyne::proxy
