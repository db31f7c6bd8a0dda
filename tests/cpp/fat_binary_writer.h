// Fat binaries made by hand, so that their reader is tested where no nvcc is.
#pragma once

#include <elf.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "proxy/fat_binary.h"

namespace mnemosyne::testing {

using Bytes = std::vector<std::byte>;

inline void append(Bytes* bytes, const void* data, size_t size) {
  const auto* from = static_cast<const std::byte*>(data);
  bytes->insert(bytes->end(), from, from + size);
}
template <typename T>
void append(Bytes* bytes, const T& value) {
  append(bytes, &value, sizeof value);
}
inline Bytes bytesOf(const std::string& text) {
  Bytes bytes;
  append(&bytes, text.data(), text.size());
  return bytes;
}

using Layouts = std::map<std::string, std::vector<proxy::KernelParameter>>;

// A cubin with no code in it: sections of information, and symbols.
class CubinWriter {
 public:
  CubinWriter() {
    addSection("", SHT_NULL, {});
    symbols_.resize(sizeof(Elf64_Sym));
  }

  // `is_large`: as ptxas tells parameters above 4 KiB.
  CubinWriter& kernel(const std::string& name,
                      const std::vector<proxy::KernelParameter>& parameters,
                      bool is_large = false) {
    Bytes info;
    uint16_t end = 0;
    for (size_t n = parameters.size(); n-- > 0;) {  // the last one first
      const auto [offset, size] = parameters[n];
      end = std::max<uint16_t>(end, static_cast<uint16_t>(offset + size));
      append(&info, Attribute{4, uint8_t(is_large ? 0x45 : 0x17), 12});
      append(&info, uint32_t{0});
      append(&info, static_cast<uint16_t>(n));
      append(&info, static_cast<uint16_t>(offset));
      append(&info, is_large ? size | 0x5000000 : size << 18 | 0x1f000);
    }
    append(&info, Attribute{3, 0x1b, 0xff});  // of no interest
    append(&info, Attribute{3, 0x19, end});
    append(&info, Attribute{4, 0x36, 4});
    append(&info, uint32_t{8});
    addSection(".nv.info." + name, SHT_PROGBITS, info);
    const auto code = addSection(".text." + name, SHT_PROGBITS, Bytes(16));
    addSymbol(name, STT_FUNC, 0x10, code, 16);
    return *this;
  }

  // What a kernel calls; linked separately, it has information as well.
  CubinWriter& function(const std::string& name) {
    Bytes info;
    append(&info, Attribute{3, 0x1b, 0xff});
    addSection(".nv.info." + name, SHT_PROGBITS, info);
    const auto code = addSection(".text." + name, SHT_PROGBITS, Bytes(16));
    addSymbol(name, STT_FUNC, 0, code, 16);
    return *this;
  }

  CubinWriter& variable(const std::string& name, uint64_t size,
                        const Bytes& value = {}) {
    const auto in = value.empty()
                        ? addSection(".nv.global", SHT_NOBITS, {}, size)
                        : addSection(".nv.global.init", SHT_PROGBITS, value);
    addSymbol(name, STT_OBJECT, 0, in, size);
    return *this;
  }

  Bytes build() {
    const auto strings = addSection(".strtab", SHT_STRTAB, names_);
    const auto symbols = addSection(".symtab", SHT_SYMTAB, symbols_);
    sections_[symbols].sh_link = strings;
    const auto names = addSection(".shstrtab", SHT_STRTAB, {});
    Elf64_Ehdr header{};
    std::memcpy(header.e_ident, "\177ELF\2\1\1\x41\x8", 9);
    header.e_type = ET_EXEC;
    header.e_machine = 190;
    header.e_shoff = sizeof header;
    header.e_shentsize = sizeof(Elf64_Shdr);
    header.e_shnum = static_cast<uint16_t>(sections_.size());
    header.e_shstrndx = names;
    const uint64_t begin =
        sizeof header + sections_.size() * sizeof(Elf64_Shdr);
    for (auto& section : sections_) section.sh_offset += begin;
    sections_[names].sh_offset = begin + contents_.size();
    sections_[names].sh_size = section_names_.size();
    Bytes cubin;
    append(&cubin, header);
    append(&cubin, sections_.data(), sections_.size() * sizeof(Elf64_Shdr));
    append(&cubin, contents_.data(), contents_.size());
    append(&cubin, section_names_.data(), section_names_.size());
    return cubin;
  }

 private:
  struct Attribute {
    uint8_t format, id;
    uint16_t value;
  };

  static uint32_t addName(Bytes* names, const std::string& name) {
    const auto at = static_cast<uint32_t>(names->size());
    append(names, name.c_str(), name.size() + 1);
    return at;
  }

  uint16_t addSection(const std::string& name, uint32_t type,
                      const Bytes& contents, uint64_t size = 0) {
    Elf64_Shdr section{};
    section.sh_name = addName(&section_names_, name);
    section.sh_type = type;
    section.sh_offset = contents_.size();
    section.sh_size = std::max<uint64_t>(size, contents.size());
    append(&contents_, contents.data(), contents.size());
    sections_.push_back(section);
    return static_cast<uint16_t>(sections_.size() - 1);
  }

  void addSymbol(const std::string& name, unsigned char type,
                 unsigned char other, uint16_t section, uint64_t size) {
    Elf64_Sym symbol{};
    symbol.st_name = addName(&names_, name);
    symbol.st_info = ELF64_ST_INFO(STB_GLOBAL, type);
    symbol.st_other = other;
    symbol.st_shndx = section;
    symbol.st_size = size;
    append(&symbols_, symbol);
  }

  std::vector<Elf64_Shdr> sections_;
  Bytes contents_, section_names_, names_, symbols_;
};

enum class Packing { kNone, kZstd, kLz4 };

// Valid, though no smaller than what is packed: the bytes as they are.
inline Bytes packZstd(const Bytes& bytes) {
  Bytes packed;
  append(&packed, uint32_t{0xfd2fb528});
  append(&packed, uint8_t{0xa0});  // one segment, its size in 4 bytes
  append(&packed, static_cast<uint32_t>(bytes.size()));
  constexpr size_t kMostOfBlock = 100'000;
  for (size_t at = 0; at == 0 || at < bytes.size(); at += kMostOfBlock) {
    const size_t size = std::min(kMostOfBlock, bytes.size() - at);
    const auto block =
        static_cast<uint32_t>(size << 3 | (at + size == bytes.size() ? 1 : 0));
    append(&packed, &block, 3);
    append(&packed, bytes.data() + at, size);
  }
  return packed;
}

inline Bytes packLz4(const Bytes& bytes) {
  Bytes packed;
  append(&packed, uint8_t(std::min<size_t>(bytes.size(), 15) << 4));
  if (bytes.size() >= 15) {
    size_t more = bytes.size() - 15;
    for (; more >= 255; more -= 255) append(&packed, uint8_t{255});
    append(&packed, static_cast<uint8_t>(more));
  }
  append(&packed, bytes.data(), bytes.size());
  return packed;
}

class FatBinaryWriter {
 public:
  FatBinaryWriter& cubin(uint32_t architecture, const Bytes& code,
                         Packing packing = Packing::kNone, char variant = 0) {
    return image(2, architecture, code, packing, variant);
  }
  FatBinaryWriter& ptx(uint32_t architecture, const std::string& text,
                       Packing packing = Packing::kNone, char variant = 0) {
    return image(1, architecture, bytesOf(text), packing, variant);
  }

  FatBinaryWriter& image(uint16_t kind, uint32_t architecture,
                         const Bytes& code, Packing packing, char variant) {
    uint64_t flags = 0x11;
    if (packing == Packing::kLz4) flags |= 0x2000;
    if (packing == Packing::kZstd) flags |= 0x8000;
    if (variant == 'a') flags |= 0x100000;
    if (variant == 'f') flags |= 0x200000;
    Bytes payload = packing == Packing::kZstd  ? packZstd(code)
                    : packing == Packing::kLz4 ? packLz4(code)
                                               : code;
    const auto packed =
        packing == Packing::kNone ? 0 : static_cast<uint32_t>(payload.size());
    payload.resize((payload.size() + 7) / 8 * 8);
    append(&images_, kind);
    append(&images_, uint16_t{0x101});
    append(&images_, uint32_t{64});
    append(&images_, uint64_t{payload.size()});
    append(&images_, packed);
    append(&images_, uint32_t{0});
    append(&images_, uint32_t{0x10008});
    append(&images_, architecture);
    append(&images_, uint64_t{0});
    append(&images_, flags);
    append(&images_, uint64_t{0});
    append(&images_, uint64_t{packed != 0 ? code.size() : 0});
    append(&images_, payload.data(), payload.size());
    return *this;
  }

  Bytes build() const {
    Bytes bytes;
    append(&bytes, uint32_t{0xba55ed50});
    append(&bytes, uint16_t{1});
    append(&bytes, uint16_t{16});
    append(&bytes, uint64_t{images_.size()});
    append(&bytes, images_.data(), images_.size());
    return bytes;
  }

 private:
  Bytes images_;
};

// What __cudaRegisterFatBinary is given.
struct FatBinaryWrapper {
  uint32_t magic = 0x466243b1;
  uint32_t version = 1;
  const void* data = nullptr;
  void* file_name = nullptr;
};

}  // namespace mnemosyne::testing
