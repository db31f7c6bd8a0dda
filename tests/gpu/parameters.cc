// Where the parameters of kernels lie, by the driver and by what the proxy
// reads out of fat binaries; they must agree.
//
//   parameters LIBCUDA LIBRARY COUNT SECONDS
//
// Looks at about COUNT kernels of LIBRARY, evenly spread, and at no more of
// them after so many seconds. Ends with 1 if one differs.
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/deadline.h"
#include "proxy/fat_binary.h"

using namespace mnemosyne;
using namespace mnemosyne::proxy;

namespace {

constexpr uint32_t kFatBinaryMagic = 0xba55ed50;

template <typename... Arguments>
int call(void* library, const char* name, Arguments... arguments) {
  auto* function =
      reinterpret_cast<int (*)(Arguments...)>(dlsym(library, name));
  if (function == nullptr) {
    std::fprintf(stderr, "no function %s\n", name);
    std::exit(2);
  }
  return function(arguments...);
}

void require(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "%s gives error %d\n", what, error);
  std::exit(2);
}

std::span<const std::byte> contentsOf(const char* path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (file < 0 || fstat(file, &status) != 0) require(errno, path);
  void* at = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  if (at == MAP_FAILED) require(errno, path);
  return {static_cast<const std::byte*>(at),
          static_cast<size_t>(status.st_size)};
}

// The section of a library in which nvcc puts all device code.
std::span<const std::byte> deviceCode(std::span<const std::byte> library) {
  Elf64_Ehdr header;
  std::memcpy(&header, library.data(), sizeof header);
  const auto* sections =
      reinterpret_cast<const Elf64_Shdr*>(library.data() + header.e_shoff);
  const auto* names = reinterpret_cast<const char*>(
      library.data() + sections[header.e_shstrndx].sh_offset);
  for (int n = 0; n < header.e_shnum; ++n) {
    if (std::strcmp(names + sections[n].sh_name, ".nv_fatbin") == 0) {
      return library.subspan(sections[n].sh_offset, sections[n].sh_size);
    }
  }
  std::fprintf(stderr, "the library has no device code\n");
  std::exit(2);
}

struct Counts {
  int binaries = 0, kernels = 0, looked_at = 0, unknown = 0, different = 0;
  int without_code = 0;  // nothing for this device
};

class Comparison {
 public:
  Comparison(void* driver, int capability, int every)
      : driver_(driver), capability_(capability), every_(every) {}

  void lookAt(const FatBinary& binary, Counts* counts) const {
    KernelTable table;
    try {
      table = binary.kernels(capability_);
    } catch (const FatBinaryError&) {
      ++counts->without_code;
      return;
    }
    ++counts->binaries;
    void* library = nullptr;
    for (const auto& [name, layout] : table.kernels) {
      if (counts->kernels++ % every_ != 0) continue;
      if (library == nullptr) {
        require(
            call(driver_, "cuLibraryLoadData", &library,
                 static_cast<const void*>(binary.bytes().data()),
                 static_cast<int*>(nullptr), static_cast<void**>(nullptr), 0u,
                 static_cast<int*>(nullptr), static_cast<void**>(nullptr), 0u),
            "cuLibraryLoadData");
      }
      ++counts->looked_at;
      compare(library, name, layout, counts);
    }
    if (library != nullptr) call(driver_, "cuLibraryUnload", library);
  }

 private:
  void compare(void* library, const std::string& name,
               const KernelLayout& layout, Counts* counts) const {
    void* kernel = nullptr;
    if (call(driver_, "cuLibraryGetKernel", &kernel, library, name.c_str())) {
      if (++counts->unknown <= 5) {
        std::printf("the driver does not know %s\n", name.c_str());
      }
      return;
    }
    std::vector<KernelParameter> told;
    size_t offset = 0, size = 0;
    while (call(driver_, "cuKernelGetParamInfo", kernel, told.size(), &offset,
                &size) == 0) {
      told.push_back(
          {static_cast<uint32_t>(offset), static_cast<uint32_t>(size)});
    }
    if (told != layout.parameters && ++counts->different <= 5) {
      std::printf("%s: %zu parameters, by the driver %zu\n", name.c_str(),
                  layout.parameters.size(), told.size());
    }
  }

  void* const driver_;
  const int capability_, every_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 64;
  void* driver = dlopen(argv[1], RTLD_NOW);
  if (driver == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  int major = 0, minor = 0;
  void* context = nullptr;
  require(call(driver, "cuInit", 0u), "cuInit");
  require(call(driver, "cuDeviceGetAttribute", &major, 75, 0),
          "its capability");
  require(call(driver, "cuDeviceGetAttribute", &minor, 76, 0),
          "its capability");
  require(call(driver, "cuDevicePrimaryCtxRetain", &context, 0), "a context");
  require(call(driver, "cuCtxSetCurrent", context), "cuCtxSetCurrent");

  constexpr int kKernelsOfTorch = 21'000;
  const int count = std::max(std::atoi(argv[3]), 1);
  const Comparison comparison(driver, 10 * major + minor,
                              std::max(kKernelsOfTorch / count, 1));
  const auto deadline = Deadline::in(Milliseconds(1000 * std::atoi(argv[4])));
  const auto code = deviceCode(contentsOf(argv[2]));
  Counts counts;
  size_t at = 0;
  while (at + 16 <= code.size() && !deadline.expired()) {
    uint32_t magic;
    std::memcpy(&magic, code.data() + at, sizeof magic);
    if (magic != kFatBinaryMagic) {  // a gap in front of the next one
      at += 8;
      continue;
    }
    const FatBinary binary = FatBinary::in(code.subspan(at));
    comparison.lookAt(binary, &counts);
    at += (binary.sizeBytes() + 7) / 8 * 8;
  }
  std::printf(
      "binaries %d without_code %d kernels %d looked_at %d unknown %d "
      "different %d percent_read %zu\n",
      counts.binaries, counts.without_code, counts.kernels, counts.looked_at,
      counts.unknown, counts.different, 100 * at / code.size());
  return counts.looked_at > 0 && counts.unknown + counts.different == 0 ? 0 : 1;
}
