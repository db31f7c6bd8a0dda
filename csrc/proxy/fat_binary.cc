#include "proxy/fat_binary.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "proxy/byte_view.h"
#include "proxy/cubin.h"
#include "proxy/decompression.h"
#include "proxy/ptx.h"

namespace mnemosyne::proxy {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kFatBinaryMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;
constexpr uint16_t kCubin = 2;

// Bits of an image's flags, as nvcc 13 sets them.
constexpr uint64_t kIsLz4 = 0x2000;
constexpr uint64_t kIsZstd = 0x8000;
constexpr uint64_t kIsForOneDevice = 0x100000;  // sm_90a
constexpr uint64_t kIsForFamily = 0x200000;     // sm_100f

struct Wrapper {
  uint32_t magic;
  uint32_t version;
  const void* data;
  void* unused;
};

struct Header {
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t image_bytes;  // of all images, with their headers
};
static_assert(sizeof(Header) == 16);

// Behind it: options of the compiler, up to header_bytes.
struct ImageHeader {
  uint16_t kind;
  uint16_t version;
  uint32_t header_bytes;
  uint64_t padded_bytes;
  uint32_t compressed_bytes;
  uint32_t options_offset;
  uint32_t version_of_code;
  uint32_t architecture;  // 90: sm_90, compute_90
  uint64_t name;
  uint64_t flags;
  uint64_t unused;
  uint64_t unpacked_bytes;
};
static_assert(sizeof(ImageHeader) == 64);

struct Image {
  ImageHeader header;
  std::span<const std::byte> payload;
};

bool suits(const ImageHeader& image, uint32_t device) {
  if (image.kind != kCubin && image.kind != kPtx) return false;
  if (image.flags & kIsForOneDevice) return image.architecture == device;
  if (image.architecture > device) return false;
  const bool is_same_major = image.architecture / 10 == device / 10;
  const bool is_general = image.kind == kPtx && !(image.flags & kIsForFamily);
  return is_general || is_same_major;
}

// The driver prefers what is compiled already, and what is made for the device.
auto preference(const ImageHeader& image) {
  return std::make_tuple(image.kind == kCubin, image.architecture,
                         (image.flags & kIsForOneDevice) != 0,
                         (image.flags & kIsForFamily) != 0);
}

std::string nameOf(const ImageHeader& image) {
  std::string name = image.kind == kPtx ? " compute_" : " sm_";
  name += std::to_string(image.architecture);
  if (image.flags & kIsForOneDevice) name += 'a';
  if (image.flags & kIsForFamily) name += 'f';
  return name;
}

Image chosen(const ByteView& code, uint32_t device) {
  std::optional<Image> best;
  std::string others;
  for (uint64_t at = code.get<Header>(0).header_bytes; at < code.size();) {
    const auto image = code.get<ImageHeader>(at);
    if (image.header_bytes < sizeof(ImageHeader)) {
      throw FatBinaryError("an image of a fat binary has a header of " +
                           std::to_string(image.header_bytes) + " bytes");
    }
    const auto payload = ByteView(code.slice(at, code.size() - at))
                             .slice(image.header_bytes, image.padded_bytes);
    if (suits(image, device)) {
      if (!best || preference(image) > preference(best->header)) {
        best = Image{image, payload};
      }
    } else if (others.size() < 200) {
      others += nameOf(image);
    }
    at += image.header_bytes + payload.size();
  }
  if (best) return *best;
  throw FatBinaryError("device code has nothing for sm_" +
                       std::to_string(device) + ", only:" + others);
}

KernelTable tableOf(uint16_t kind, std::span<const std::byte> code,
                    int compute_capability) {
  if (kind == kCubin) return readCubin(code);
  const auto* text = reinterpret_cast<const char*>(code.data());
  return readPtx({text, code.size()}, compute_capability);
}

KernelTable tableOf(const Image& image, int compute_capability) {
  const auto& header = image.header;
  if (!(header.flags & (kIsZstd | kIsLz4))) {
    return tableOf(header.kind, image.payload, compute_capability);
  }
  const auto packed = ByteView(image.payload).slice(0, header.compressed_bytes);
  const auto unpacked = header.flags & kIsZstd
                            ? unpackZstd(packed, header.unpacked_bytes)
                            : unpackLz4(packed, header.unpacked_bytes);
  return tableOf(header.kind, unpacked.bytes(), compute_capability);
}

bool isCubin(const ByteView& code) { return code.startsWith(0, "\177ELF"); }
bool isFatBinary(const ByteView& code) {
  return code.size() >= sizeof(Header) &&
         code.get<Header>(0).magic == kFatBinaryMagic;
}

// Requires: `code` is readable as far as its headers say.
size_t sizeOf(const void* code) {
  const auto* begin = static_cast<const std::byte*>(code);
  uint32_t magic;
  std::memcpy(&magic, code, sizeof magic);
  if (magic == kFatBinaryMagic) {
    const auto header = ByteView({begin, sizeof(Header)}).get<Header>(0);
    if (header.image_bytes > kMaxUnpackedBytes) {
      throw FatBinaryError("a fat binary says that it has " +
                           std::to_string(header.image_bytes) + " bytes");
    }
    return header.header_bytes + header.image_bytes;
  }
  if (isCubin(ByteView({begin, 4}))) return sizeOfCubin(begin);
  // PTX is text from its first byte on.
  const auto first = std::to_integer<unsigned char>(*begin);
  if (first != '\t' && first != '\n' && first != '\r' &&
      (first < ' ' || first > '~')) {
    throw FatBinaryError("these bytes are no device code");
  }
  return strnlen(static_cast<const char*>(code), kMaxUnpackedBytes);
}

}  // namespace

FatBinary FatBinary::at(const void* code) {
  if (code == nullptr) throw FatBinaryError("device code is at no address");
  uint32_t magic;
  std::memcpy(&magic, code, sizeof magic);
  if (magic == kWrapperMagic) {
    Wrapper wrapper;
    std::memcpy(&wrapper, code, sizeof wrapper);
    code = wrapper.data;
    if (code == nullptr) throw FatBinaryError("device code is at no address");
  }
  return in({static_cast<const std::byte*>(code), sizeOf(code)});
}

FatBinary FatBinary::in(std::span<const std::byte> code) {
  const ByteView view(code);
  if (!isFatBinary(view)) return FatBinary(code);
  const auto header = view.get<Header>(0);
  if (header.header_bytes < sizeof(Header)) {
    throw FatBinaryError("a fat binary has a header of " +
                         std::to_string(header.header_bytes) + " bytes");
  }
  view.slice(header.header_bytes, header.image_bytes);  // are there
  return FatBinary(code.first(header.header_bytes + header.image_bytes));
}

KernelTable FatBinary::kernels(int compute_capability) const {
  const ByteView code(bytes_);
  if (isCubin(code)) return tableOf(kCubin, bytes_, compute_capability);
  if (!isFatBinary(code)) return tableOf(kPtx, bytes_, compute_capability);
  return tableOf(chosen(code, static_cast<uint32_t>(compute_capability)),
                 compute_capability);
}

}  // namespace mnemosyne::proxy
