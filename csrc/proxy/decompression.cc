#include "proxy/decompression.h"

#include <dlfcn.h>

#include <cstring>
#include <string>

#include "proxy/fat_binary.h"

namespace mnemosyne::proxy {
namespace {

// How many bytes one packed byte can stand for at most: whoever claims more
// lies, and gets no memory. A block of Zstandard has 128 KiB at most, and four
// bytes at least. A byte of LZ4 lengthens a match by 255.
constexpr uint64_t kMostOfZstd = (128 << 10) / 4;
constexpr uint64_t kMostOfLz4 = 255;

void checkSize(uint64_t packed_bytes, uint64_t size_bytes, uint64_t most) {
  if (size_bytes <= kMaxUnpackedBytes && size_bytes / most <= packed_bytes) {
    return;
  }
  throw FatBinaryError("an image of " + std::to_string(packed_bytes) +
                       " bytes says that it unpacks to " +
                       std::to_string(size_bytes));
}

[[noreturn]] void throwDamaged() {
  throw FatBinaryError("a packed image of a fat binary is damaged");
}

// libzstd's own functions; no header of it is needed.
class Zstd {
 public:
  static const Zstd& instance() {
    static const Zstd loaded;
    return loaded;
  }

  size_t (*decompress)(void*, size_t, const void*, size_t);
  unsigned (*isError)(size_t);
  unsigned long long (*getFrameContentSize)(const void*, size_t);

 private:
  Zstd() : library_(::dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) {
      throw FatBinaryError(
          "device code is packed with Zstandard, and libzstd.so.1 cannot be "
          "loaded: install libzstd, or compile with --compress-mode=none");
    }
    find("ZSTD_decompress", &decompress);
    find("ZSTD_isError", &isError);
    find("ZSTD_getFrameContentSize", &getFrameContentSize);
  }

  template <typename Function>
  void find(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(::dlsym(library_, name));
    if (*function == nullptr) {
      throw FatBinaryError(std::string("libzstd.so.1 has no ") + name);
    }
  }

  void* library_;  // stays for good
};

class Lz4 {
 public:
  Lz4(std::span<const std::byte> packed, std::byte* to, size_t size)
      : from_(packed), begin_(to), to_(to), end_(to + size) {}

  // A sequence is a token with two lengths of four bits, literals, and how far
  // back the match lies. The last one ends with its literals.
  void unpack() {
    while (true) {
      const unsigned token = next();
      literals(length(token >> 4));
      if (from_.empty()) break;
      const size_t low = next();
      const size_t distance = low | size_t{next()} << 8;
      match(distance, length(token & 15) + kShortestMatch);
    }
    if (to_ != end_) throwDamaged();
  }

 private:
  static constexpr size_t kShortestMatch = 4;

  unsigned next() {
    if (from_.empty()) throwDamaged();
    const auto value = std::to_integer<unsigned>(from_.front());
    from_ = from_.subspan(1);
    return value;
  }

  // 15 means that more bytes follow; each is added, up to one below 255.
  size_t length(size_t nibble) {
    if (nibble < 15) return nibble;
    unsigned more;
    do {
      more = next();
      nibble += more;
    } while (more == 255);
    return nibble;
  }

  void literals(size_t count) {
    if (count > from_.size() || count > room()) throwDamaged();
    if (count == 0) return;
    std::memcpy(to_, from_.data(), count);
    from_ = from_.subspan(count);
    to_ += count;
  }

  void match(size_t distance, size_t count) {
    if (distance == 0 || distance > static_cast<size_t>(to_ - begin_) ||
        count > room()) {
      throwDamaged();
    }
    // Byte by byte: a match may overlap itself.
    for (; count > 0; --count, ++to_) *to_ = *(to_ - distance);
  }

  size_t room() const { return static_cast<size_t>(end_ - to_); }

  std::span<const std::byte> from_;
  std::byte* begin_;
  std::byte* to_;
  std::byte* end_;
};

}  // namespace

UnpackedBytes unpackZstd(std::span<const std::byte> packed,
                         uint64_t size_bytes) {
  const Zstd& zstd = Zstd::instance();
  checkSize(packed.size(), size_bytes, kMostOfZstd);
  if (zstd.getFrameContentSize(packed.data(), packed.size()) != size_bytes) {
    throwDamaged();
  }
  UnpackedBytes unpacked(size_bytes);
  const size_t result = zstd.decompress(unpacked.data(), size_bytes,
                                        packed.data(), packed.size());
  if (zstd.isError(result) || result != size_bytes) throwDamaged();
  return unpacked;
}

UnpackedBytes unpackLz4(std::span<const std::byte> packed,
                        uint64_t size_bytes) {
  checkSize(packed.size(), size_bytes, kMostOfLz4);
  UnpackedBytes unpacked(size_bytes);
  Lz4(packed, unpacked.data(), size_bytes).unpack();
  return unpacked;
}

}  // namespace mnemosyne::proxy
