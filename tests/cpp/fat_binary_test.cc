// Fat binaries made by hand (fat_binary_writer.h), and those that nvcc makes of
// cuda/layouts.cu where there is one.
#include "proxy/fat_binary.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <iterator>

#include "cuda/layouts.h"
#include "fat_binary_writer.h"
#include "proxy/decompression.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

using proxy::FatBinary;
using proxy::FatBinaryError;
using proxy::KernelParameter;
using proxy::KernelTable;
using Parameters = std::vector<KernelParameter>;

Parameters parametersOf(const KernelTable& table, const std::string& name) {
  const auto found = table.kernels.find(name);
  if (found == table.kernels.end()) {
    throw std::runtime_error("there is no kernel " + name);
  }
  return found->second.parameters;
}

bool equal(const KernelTable& a, const KernelTable& b) {
  const auto same = [](const auto& x, const auto& y) {
    return x.first == y.first && x.second.parameters == y.second.parameters &&
           x.second.size_bytes == y.second.size_bytes;
  };
  return std::equal(a.kernels.begin(), a.kernels.end(), b.kernels.begin(),
                    b.kernels.end(), same) &&
         a.variables == b.variables;
}

Bytes cubinWith(const std::string& kernel) {
  return CubinWriter().kernel(kernel, {{0, 8}}).build();
}
const std::string kPtxHead = ".version 9.0\n.target sm_80\n.address_size 64\n";
std::string ptxWith(const std::string& kernel) {
  return kPtxHead + ".visible .entry " + kernel + "(.param .u64 p) { ret; }";
}

// Which image is chosen shows in the only kernel that it has.
std::string chosen(const Bytes& fat_binary, int compute_capability) {
  const auto table = FatBinary::in(fat_binary).kernels(compute_capability);
  EXPECT_EQ(table.kernels.size(), 1u);
  return table.kernels.begin()->first;
}

}  // namespace

TEST(the_parameters_of_a_kernel_come_in_their_order_with_offset_and_size) {
  const Parameters few = {{0, 4}, {8, 8}, {16, 1}, {20, 12}};
  const Parameters large = {{0, 4}, {4, 20'000}, {20'008, 8}};
  const Bytes cubin = CubinWriter()
                          .kernel("few", few)
                          .kernel("none", {})
                          .kernel("large", large, true)
                          .function("called")
                          .variable("history", 140)
                          .variable("greeting", 5, bytesOf("hello"))
                          .build();
  const auto table = FatBinary::in(cubin).kernels(90);
  EXPECT_EQ(table.kernels.size(), 3u);
  EXPECT(parametersOf(table, "few") == few);
  EXPECT(parametersOf(table, "none").empty());
  EXPECT(parametersOf(table, "large") == large);
  EXPECT_EQ(table.kernels.at("few").size_bytes, 32u);
  EXPECT_EQ(table.kernels.at("none").size_bytes, 0u);
  EXPECT_EQ(table.kernels.at("large").size_bytes, 20'016u);
  EXPECT_EQ(table.variables.size(), 2u);
  EXPECT_EQ(table.variables.at("history"), 140u);
  EXPECT_EQ(table.initial_values.size(), 1u);
  EXPECT(table.initial_values.at("greeting") == bytesOf("hello"));
}

TEST(an_image_reads_the_same_however_it_is_packed) {
  const Bytes cubin = CubinWriter()
                          .kernel("add", {{0, 8}, {8, 4}})
                          .variable("padding", 1)
                          .build();
  const auto plain = FatBinary::in(cubin).kernels(90);
  const std::string text = ptxWith("scale");
  for (const auto packing : {Packing::kNone, Packing::kZstd, Packing::kLz4}) {
    const Bytes packed = FatBinaryWriter()
                             .cubin(90, cubin, packing)
                             .ptx(70, text, packing)
                             .build();
    EXPECT(equal(FatBinary::in(packed).kernels(90), plain));
    EXPECT(parametersOf(FatBinary::in(packed).kernels(80), "scale") ==
           (Parameters{{0, 8}}));
  }
}

TEST(matches_of_lz4_may_overlap_themselves_and_be_long) {
  // "ab", 300 bytes from two back, "cd".
  const Bytes packed =
      bytesOf(std::string("\x2f"
                          "ab\x02\x00\xff\x1a"
                          "\x20"
                          "cd",
                          10));
  const auto unpacked = proxy::unpackLz4(packed, 304);
  const auto bytes = unpacked.bytes();
  EXPECT_EQ(std::to_integer<int>(bytes[300]), int{'a'});
  EXPECT_EQ(std::to_integer<int>(bytes[301]), int{'b'});
  EXPECT_EQ(std::to_integer<int>(bytes[302]), int{'c'});
  EXPECT_THROWS(FatBinaryError, proxy::unpackLz4(packed, 303));
  EXPECT_THROWS(FatBinaryError, proxy::unpackLz4(packed, 305));
  const Bytes before_its_begin =
      bytesOf(std::string("\x10"
                          "a\x02\x00\x00",
                          5));
  EXPECT_THROWS(FatBinaryError, proxy::unpackLz4(before_its_begin, 5));
}

TEST(a_device_gets_the_image_that_its_driver_would_choose) {
  const Bytes all = FatBinaryWriter()
                        .ptx(80, ptxWith("ptx80"))
                        .cubin(80, cubinWith("sm80"))
                        .cubin(86, cubinWith("sm86"))
                        .cubin(90, cubinWith("sm90"))
                        .cubin(90, cubinWith("sm90a"), Packing::kNone, 'a')
                        .cubin(100, cubinWith("sm100f"), Packing::kNone, 'f')
                        .cubin(103, cubinWith("sm103a"), Packing::kNone, 'a')
                        .ptx(90, ptxWith("ptx90a"), Packing::kNone, 'a')
                        .ptx(120, ptxWith("ptx120f"), Packing::kNone, 'f')
                        .build();
  EXPECT_EQ(chosen(all, 80), "sm80");
  EXPECT_EQ(chosen(all, 86), "sm86");
  EXPECT_EQ(chosen(all, 87), "sm86");  // same major, lower minor
  EXPECT_EQ(chosen(all, 90), "sm90a");
  EXPECT_EQ(chosen(all, 100), "sm100f");
  EXPECT_EQ(chosen(all, 101), "sm100f");
  EXPECT_EQ(chosen(all, 103), "sm103a");
  EXPECT_EQ(chosen(all, 110), "ptx80");  // no cubin crosses a major
  EXPECT_EQ(chosen(all, 121), "ptx120f");
  EXPECT_THROWS(FatBinaryError, FatBinary::in(all).kernels(75));
}

TEST(an_image_of_another_kind_is_passed_over) {
  const Bytes code =
      FatBinaryWriter()
          .image(8, 90, bytesOf("intermediate"), Packing::kNone, 0)
          .cubin(90, cubinWith("add"))
          .build();
  EXPECT_EQ(chosen(code, 90), "add");
}

TEST(code_is_found_behind_a_wrapper_by_its_header_as_cubin_and_as_text) {
  Bytes code = FatBinaryWriter().cubin(90, cubinWith("add")).build();
  const size_t size = code.size();
  code.resize(size + 100);  // what lies behind it is not ours
  FatBinaryWrapper wrapper;
  wrapper.data = code.data();
  for (const void* at : {static_cast<const void*>(&wrapper),
                         static_cast<const void*>(code.data())}) {
    const auto found = FatBinary::at(at);
    EXPECT_EQ(found.sizeBytes(), size);
    EXPECT(found.bytes().data() == code.data());
    EXPECT_EQ(found.kernels(90).kernels.count("add"), 1u);
  }
  const Bytes cubin = cubinWith("scale");
  EXPECT_EQ(FatBinary::at(cubin.data()).sizeBytes(), cubin.size());
  EXPECT_EQ(FatBinary::at(cubin.data()).kernels(90).kernels.count("scale"), 1u);
  const std::string text = ptxWith("fill");
  EXPECT_EQ(FatBinary::at(text.c_str()).sizeBytes(), text.size());
  EXPECT_EQ(FatBinary::at(text.c_str()).kernels(90).kernels.count("fill"), 1u);
  EXPECT_THROWS(FatBinaryError, FatBinary::at(nullptr));
  EXPECT_THROWS(FatBinaryError, FatBinary::at("\x01\x02\x03\x04"));
}

TEST(ptx_tells_parameters_of_every_type_past_comments_and_bodies) {
  const std::string text = kPtxHead + R"ptx(
    // .entry comment(.param .u64 a)
    /* .entry comment(.param .u64 a) */
    .file 1 ".entry path(.param .u64 a)"
    .extern .global .align 4 .u32 elsewhere;
    .global .align 8 .b8 matrix[3][8];
    .const .align 16 .v4 .f32 pairs[2] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
    .global .attribute(.managed) .align 4 .u32 both = 5;
    .func (.param .b32 result) helper(.param .u64 .ptr .global .align 4 x)
    { .param .u64 local; .global .u32 inner; }
    .visible .entry all(
      .param .u8 a, .param .s16 b, .param .f64 c, .param .b32 d,
      .param .align 8 .b8 e[24], .param .u64 .ptr .global .align 32 f,
      .param .align 1 .b8 g[3], .param .f16x2 h
    ) .maxntid 128, 1, 1 { { .reg .b32 r; } ret; }
    .weak .entry none() { ret; }
    .entry bare { ret; }
  )ptx";
  const auto table = FatBinary::in(bytesOf(text)).kernels(90);
  EXPECT_EQ(table.kernels.size(), 3u);
  EXPECT(parametersOf(table, "all") == (Parameters{{0, 1},
                                                   {2, 2},
                                                   {8, 8},
                                                   {16, 4},
                                                   {24, 24},
                                                   {48, 8},
                                                   {56, 3},
                                                   {60, 4}}));
  EXPECT_EQ(table.kernels.at("all").size_bytes, 64u);
  EXPECT(parametersOf(table, "none").empty());
  EXPECT(parametersOf(table, "bare").empty());
  EXPECT_EQ(table.variables.size(), 3u);
  EXPECT_EQ(table.variables.at("matrix"), 24u);
  EXPECT_EQ(table.variables.at("pairs"), 32u);
  EXPECT_EQ(table.variables.at("both"), 4u);
}

TEST(ptx_that_makes_no_sense_is_an_error) {
  for (const char* text :
       {"", "no code", ".entry a(.param .u64 p) {}",
        ".version 9.0 .entry a(.param .u64 p", ".version 9.0 .entry a(.param",
        ".version 9.0 .entry a(.param .align 3 .b8 p[4]) {}",
        ".version 9.0 .entry a(.param .align 99999999 .b8 p[4]) {}",
        ".version 9.0 .entry a(.param .b8 p[]) {}",
        ".version 9.0 .entry a(.param .b8 p[-1]) {}",
        ".version 9.0 .entry a(.param .b8 p[0]) {}",
        ".version 9.0 .entry a(.param .b8 p[99999]) {}",
        ".version 9.0 .entry a(.param .b8 p[4294967296][4294967296]) {}",
        ".version 9.0 .entry a(.param .b8 p[18446744073709551617]) {}"}) {
    EXPECT_THROWS(FatBinaryError, FatBinary::in(bytesOf(text)).kernels(90));
  }
}

TEST(code_that_is_cut_anywhere_is_an_error_and_nothing_worse) {
  const Bytes whole = FatBinaryWriter()
                          .ptx(80, ptxWith("scale"))
                          .cubin(90, cubinWith("add"), Packing::kZstd)
                          .build();
  for (size_t size = 0; size < whole.size(); ++size) {
    // In memory of its own, so that a sanitizer sees a read behind it.
    const Bytes cut(whole.begin(),
                    whole.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_THROWS(FatBinaryError, FatBinary::in(cut).kernels(90));
  }
}

TEST(a_size_that_the_bytes_cannot_have_gets_no_memory) {
  for (const auto packing : {Packing::kZstd, Packing::kLz4}) {
    Bytes code = FatBinaryWriter().cubin(90, cubinWith("add"), packing).build();
    for (const uint64_t size :
         {uint64_t{1} << 29, uint64_t{1} << 40, ~uint64_t{0}}) {
      std::memcpy(code.data() + 16 + 56, &size, sizeof size);
      EXPECT_THROWS(FatBinaryError, FatBinary::in(code).kernels(90));
    }
  }
}

TEST(sections_that_all_lie_in_one_place_are_refused) {
  // 60,000 of them with 40 KiB of parameters each would be gigabytes.
  Bytes cubin = CubinWriter()
                    .kernel("add", Parameters(3000, KernelParameter{0, 1}))
                    .build();
  EXPECT_EQ(FatBinary::in(cubin).kernels(90).kernels.size(), 1u);
  Elf64_Ehdr header;
  std::memcpy(&header, cubin.data(), sizeof header);
  Elf64_Shdr info;
  std::memcpy(&info, cubin.data() + header.e_shoff + sizeof info, sizeof info);
  header.e_shoff = cubin.size();
  header.e_shnum = 60'000;
  std::memcpy(cubin.data(), &header, sizeof header);
  Bytes table(cubin.begin() + sizeof header,
              cubin.begin() + sizeof header + 7 * sizeof info);
  append(&cubin, table.data(), table.size());
  for (int n = 7; n < header.e_shnum; ++n) append(&cubin, info);
  EXPECT_THROWS(FatBinaryError, FatBinary::in(cubin).kernels(90));
}

#ifdef MNEMOSYNE_DEVICE_CODE  // where nvcc has put its work

namespace {

Bytes read(const std::string& name) {
  std::ifstream file(MNEMOSYNE_DEVICE_CODE "/" + name, std::ios::binary);
  EXPECT(file.good());
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return bytesOf(text);
}

KernelTable tableIn(const std::string& name, int compute_capability) {
  const Bytes code = read(name);
  return FatBinary::in(code).kernels(compute_capability);
}

struct Scalars {
  char a;
  short b;
  int c;
  long long d;
  bool e;
  float f;
  double g;
};
struct Pointers {
  const float* in;
  float* out;
  int count;
};
struct Float3 {
  float x, y, z;
};
struct Structures {
  char before;
  Padded padded;
  Byte byte;
  Nested nested;
  Float3 after;
};
struct Fill {
  Padded* out;
  Padded value;
  unsigned count;
};

#define PARAMETER(structure, field) \
  {offsetof(structure, field), sizeof(structure::field)}

// As C++ lays out a structure of the same fields.
void expectLayouts(const KernelTable& table) {
  EXPECT(parametersOf(table, "noParameters").empty());
  EXPECT(parametersOf(table, "scalars") ==
         (Parameters{PARAMETER(Scalars, a), PARAMETER(Scalars, b),
                     PARAMETER(Scalars, c), PARAMETER(Scalars, d),
                     PARAMETER(Scalars, e), PARAMETER(Scalars, f),
                     PARAMETER(Scalars, g)}));
  EXPECT(parametersOf(table, "pointers") ==
         (Parameters{PARAMETER(Pointers, in), PARAMETER(Pointers, out),
                     PARAMETER(Pointers, count)}));
  EXPECT_EQ(table.kernels.at("pointers").size_bytes, 20u);
  EXPECT(
      parametersOf(table, "structures") ==
      (Parameters{PARAMETER(Structures, before), PARAMETER(Structures, padded),
                  PARAMETER(Structures, byte), PARAMETER(Structures, nested),
                  PARAMETER(Structures, after)}));
  EXPECT(parametersOf(table, "_Z4fillI6PaddedEvPT_S1_j") ==
         (Parameters{PARAMETER(Fill, out), PARAMETER(Fill, value),
                     PARAMETER(Fill, count)}));
  EXPECT(parametersOf(table, "_Z4fillIfEvPT_S0_j") ==
         (Parameters{{0, 8}, {8, 4}, {12, 4}}));
  EXPECT(parametersOf(table, "large") ==
         (Parameters{{0, 4}, {4, sizeof(Large)}, {20'008, 8}}));
  EXPECT_EQ(table.variables.at("factor"), 4u);
  EXPECT_EQ(table.variables.at("history"), 140u);
  EXPECT_EQ(table.variables.at("weights"), 256u);
  EXPECT_EQ(table.variables.at("shared_by_both"), 4u);
  EXPECT_EQ(table.variables.size(), 4u);
}

}  // namespace

TEST(nvcc_lays_parameters_out_as_cpp_does_a_structure) {
  for (const char* name : {"zstd.fatbin", "lz4.fatbin", "plain.fatbin",
                           "ptx.fatbin", "layouts.ptx"}) {
    expectLayouts(tableIn(name, 80));
  }
  expectLayouts(tableIn("zstd.fatbin", 90));
  expectLayouts(tableIn("zstd.fatbin", 100));
}

TEST(a_cubin_of_nvcc_tells_what_a_variable_begins_as) {
  Bytes two;
  append(&two, 2.0f);
  for (const int device : {80, 90, 100}) {
    const auto table = tableIn("zstd.fatbin", device);
    EXPECT(table.initial_values.at("factor") == two);
    EXPECT(!table.initial_values.contains("history"));
  }
}

TEST(an_alignment_above_16_is_one_of_the_place_in_the_bank_of_constants) {
  const auto offset = [](const char* file, int compute_capability) {
    return parametersOf(tableIn(file, compute_capability), "aligned")[1].offset;
  };
  for (const char* file : {"zstd.fatbin", "ptx.fatbin"}) {
    EXPECT_EQ(offset(file, 80), 32u);
    EXPECT_EQ(offset(file, 90), 48u);
    EXPECT_EQ(offset(file, 100), 64u);
  }
}

TEST(ptx_tells_the_same_layouts_as_the_cubin_made_of_it) {
  for (const int device : {80, 90, 100}) {
    auto compiled = tableIn("zstd.fatbin", device);
    std::erase_if(compiled.kernels, [](const auto& kernel) {
      return kernel.first.starts_with("madeFor");
    });
    EXPECT(equal(tableIn("ptx.fatbin", device), compiled));
  }
}

TEST(of_the_images_that_nvcc_makes_the_best_is_chosen) {
  const auto has = [](int device, const char* kernel) {
    return tableIn("zstd.fatbin", device).kernels.count(kernel) == 1;
  };
  EXPECT(has(90, "madeFor90a"));
  EXPECT(!has(80, "madeFor90a"));
  EXPECT(has(100, "madeForFamily"));
  EXPECT(has(103, "madeForFamily"));
  EXPECT(!has(89, "madeForFamily"));
  EXPECT(has(120, "pointers"));  // by PTX
  EXPECT(!has(120, "madeForFamily"));
}

namespace {
// What the library of layouts registers when it is loaded.
struct Registered {
  const void* wrapper = nullptr;
  std::vector<std::string> kernels;
};
std::vector<Registered> registered;
}  // namespace

TEST(what_a_library_registers_when_it_is_loaded_is_found) {
  void* library =
      ::dlopen(MNEMOSYNE_DEVICE_CODE "/liblayouts.so", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(::dlerror());
  size_t num_kernels = 0;
  for (const auto& [wrapper, kernels] : registered) {
    const auto table = FatBinary::at(wrapper).kernels(90);
    for (const auto& name : kernels) {
      parametersOf(table, name);
      ++num_kernels;
    }
    if (!kernels.empty()) expectLayouts(table);
  }
  EXPECT_EQ(num_kernels, 9u);
  ::dlclose(library);
}

// In place of the runtime's, for the library of layouts.
extern "C" {
void** __cudaRegisterFatBinary(void* wrapper) {
  registered.push_back({wrapper, {}});
  return reinterpret_cast<void**>(registered.size());
}
void __cudaRegisterFunction(void** handle, const char*, char*, const char* name,
                            int, void*, void*, void*, void*, int*) {
  registered.at(reinterpret_cast<size_t>(handle) - 1).kernels.push_back(name);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int,
                       int) {}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t,
                              int, int) {}
// Nothing is launched.
char __cudaInitModule(void**) { return 0; }
int __cudaGetKernel(void**, const void*) { return proxy::kCudaNotSupported; }
int __cudaLaunchKernel(void*, proxy::Dim3, proxy::Dim3, void**, size_t, void*) {
  return proxy::kCudaNotSupported;
}
unsigned __cudaPopCallConfiguration(proxy::Dim3*, proxy::Dim3*, size_t*,
                                    void**) {
  return proxy::kCudaNotSupported;
}
}

#else

TEST(what_nvcc_makes_is_not_tried_since_there_is_no_nvcc) {}

#endif

}  // namespace mnemosyne::testing
