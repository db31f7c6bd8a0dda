#include "proxy/cubin.h"

#include <elf.h>

#include <algorithm>
#include <map>
#include <string_view>

#include "proxy/byte_view.h"
#include "proxy/decompression.h"

namespace mnemosyne::proxy {
namespace {

constexpr std::string_view kInfoPrefix = ".nv.info.";
constexpr unsigned char kIsEntry = 0x10;  // in st_other: a kernel

// An attribute of a .nv.info section: how it is stored, which it is, and a
// value of 16 bits, or the size of the value that follows.
struct Attribute {
  uint8_t format;
  uint8_t id;
  uint16_t value;
};
constexpr uint8_t kValueFollows = 4;
constexpr uint8_t kParameter = 0x17;
constexpr uint8_t kParametersSize = 0x19;
constexpr uint8_t kLargeParameter = 0x45;  // where kParameter has too few bits

struct ParameterInfo {
  uint32_t index;
  uint16_t ordinal;
  uint16_t offset;
  uint32_t properties;
};
static_assert(sizeof(ParameterInfo) == 12);

class Cubin {
 public:
  explicit Cubin(std::span<const std::byte> bytes)
      : bytes_(bytes), budget_(4 * bytes.size()) {
    header_ = bytes_.get<Elf64_Ehdr>(0);
    if (std::memcmp(header_.e_ident, ELFMAG, SELFMAG) != 0 ||
        header_.e_ident[EI_CLASS] != ELFCLASS64 ||
        header_.e_ident[EI_DATA] != ELFDATA2LSB ||
        header_.e_shentsize < sizeof(Elf64_Shdr)) {
      throw FatBinaryError("an image of device code is no cubin");
    }
  }

  KernelTable read() {
    const ByteView names(contents(section(header_.e_shstrndx)));
    // Functions that are no kernels have such sections too.
    std::map<std::string_view, KernelLayout> layouts;
    for (unsigned n = 0; n < header_.e_shnum; ++n) {
      const Elf64_Shdr info = section(n);
      if (!names.startsWith(info.sh_name, kInfoPrefix)) continue;
      const auto name = charged(names.text(info.sh_name + kInfoPrefix.size()));
      layouts.insert_or_assign(name, layout(charged(contents(info))));
    }
    for (unsigned n = 0; n < header_.e_shnum; ++n) {
      const Elf64_Shdr symbols = section(n);
      if (symbols.sh_type != SHT_SYMTAB) continue;
      return tableOf(symbols, names, &layouts);  // there is one
    }
    throw FatBinaryError("a cubin has no table of symbols");
  }

 private:
  Elf64_Shdr section(unsigned n) const {
    if (n >= header_.e_shnum) {
      throw FatBinaryError("a cubin refers to a section that it has not");
    }
    const uint64_t table_bytes = uint64_t{header_.e_shentsize} * n;
    return ByteView(bytes_.slice(header_.e_shoff,
                                 bytes_.size() -
                                     std::min(bytes_.size(), header_.e_shoff)))
        .get<Elf64_Shdr>(table_bytes);
  }

  std::span<const std::byte> contents(const Elf64_Shdr& section) const {
    if (section.sh_type == SHT_NOBITS) return {};
    return bytes_.slice(section.sh_offset, section.sh_size);
  }

  // A cubin that makes us read its bytes again and again is not one.
  template <typename Range>
  Range charged(Range range) {
    if (range.size() > budget_) {
      throw FatBinaryError("the sections of a cubin overlap");
    }
    budget_ -= range.size();
    return range;
  }

  static KernelLayout layout(std::span<const std::byte> info) {
    const ByteView view(info);
    KernelLayout layout;
    std::vector<std::pair<unsigned, KernelParameter>> by_ordinal;
    for (uint64_t at = 0; at < view.size();) {
      const auto attribute = view.get<Attribute>(at);
      at += sizeof attribute;
      if (attribute.id == kParametersSize) layout.size_bytes = attribute.value;
      if (attribute.format != kValueFollows) continue;
      if (attribute.id == kParameter || attribute.id == kLargeParameter) {
        const auto info = view.get<ParameterInfo>(at);
        const uint32_t size_bytes = attribute.id == kParameter
                                        ? info.properties >> 18
                                        : info.properties & 0xffff;
        by_ordinal.push_back({info.ordinal, {info.offset, size_bytes}});
      }
      at += attribute.value;
    }
    std::sort(by_ordinal.begin(), by_ordinal.end(),
              [](auto& a, auto& b) { return a.first < b.first; });
    for (const auto& [ordinal, parameter] : by_ordinal) {
      if (ordinal != layout.parameters.size() ||
          parameter.offset + parameter.size_bytes > layout.size_bytes) {
        throw FatBinaryError("the parameters of a kernel make no sense");
      }
      layout.parameters.push_back(parameter);
    }
    return layout;
  }

  KernelTable tableOf(const Elf64_Shdr& symbols, const ByteView& section_names,
                      std::map<std::string_view, KernelLayout>* layouts) {
    KernelTable table;
    const ByteView all(contents(symbols));
    const ByteView names(contents(section(symbols.sh_link)));
    for (uint64_t at = 0; at + sizeof(Elf64_Sym) <= all.size();
         at += sizeof(Elf64_Sym)) {
      const auto symbol = all.get<Elf64_Sym>(at);
      const unsigned type = ELF64_ST_TYPE(symbol.st_info);
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_shndx >= SHN_LORESERVE) {
        continue;
      }
      if (type == STT_FUNC && (symbol.st_other & kIsEntry)) {
        const auto name = charged(names.text(symbol.st_name));
        table.kernels.emplace(name, std::move((*layouts)[name]));
      } else if (type == STT_OBJECT) {
        const Elf64_Shdr in = section(symbol.st_shndx);
        if (section_names.startsWith(in.sh_name, ".nv.global") ||
            section_names.startsWith(in.sh_name, ".nv.constant")) {
          const auto name = charged(names.text(symbol.st_name));
          table.variables.emplace(name, symbol.st_size);
          if (in.sh_type == SHT_NOBITS) continue;
          const auto value = charged(
              ByteView(contents(in)).slice(symbol.st_value, symbol.st_size));
          table.initial_values.try_emplace(std::string(name), value.begin(),
                                           value.end());
        }
      }
    }
    return table;
  }

  ByteView bytes_;
  uint64_t budget_;
  Elf64_Ehdr header_;
};

}  // namespace

KernelTable readCubin(std::span<const std::byte> cubin) {
  return Cubin(cubin).read();
}

size_t sizeOfCubin(const std::byte* cubin) {
  const auto header = ByteView({cubin, sizeof(Elf64_Ehdr)}).get<Elf64_Ehdr>(0);
  uint64_t end = sizeof header;
  const auto include = [&](uint64_t offset, uint64_t size) {
    if (offset > kMaxUnpackedBytes || size > kMaxUnpackedBytes) {
      throw FatBinaryError("a cubin says that it has over 1 GiB");
    }
    end = std::max(end, offset + size);
  };
  include(header.e_phoff, uint64_t{header.e_phentsize} * header.e_phnum);
  include(header.e_shoff, uint64_t{header.e_shentsize} * header.e_shnum);
  if (header.e_shentsize < sizeof(Elf64_Shdr)) return end;
  for (unsigned n = 0; n < header.e_shnum; ++n) {
    Elf64_Shdr section;
    std::memcpy(&section,
                cubin + header.e_shoff + uint64_t{header.e_shentsize} * n,
                sizeof section);
    if (section.sh_type == SHT_NULL || section.sh_type == SHT_NOBITS) continue;
    include(section.sh_offset, section.sh_size);
  }
  return end;
}

}  // namespace mnemosyne::proxy
