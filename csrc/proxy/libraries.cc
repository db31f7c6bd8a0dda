#include "proxy/libraries.h"

#include <dlfcn.h>

namespace mnemosyne::proxy {
namespace {

constexpr std::array<const char*, kNumLibraries> kNames = {
    "libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13",
    "libnccl.so.2"};

}  // namespace

void* Libraries::open(Library library) {
  void*& handle = handles_[static_cast<size_t>(library)];
  if (handle != nullptr) return handle;
  const char* name = emulated_.empty() ? kNames[static_cast<size_t>(library)]
                                       : emulated_.c_str();
  handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw MissingLibrary(dlerror());
  return handle;
}

void Libraries::openAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t at = 0; at < kNumLibraries; ++at) open(static_cast<Library>(at));
}

void* Libraries::symbol(Library library, const char* name) {
  std::lock_guard<std::mutex> lock(mutex_);
  void* found = dlsym(open(library), name);
  if (found == nullptr) {
    throw MissingLibrary(std::string(kNames[static_cast<size_t>(library)]) +
                         " has no function " + name);
  }
  return found;
}

Driver::Driver(Libraries& libraries) {
#define MNEMOSYNE_LOAD(name, ...) \
  name = libraries.function<int(__VA_ARGS__)>(Library::kCuda, #name);
  MNEMOSYNE_DRIVER_FUNCTIONS(MNEMOSYNE_LOAD)
#undef MNEMOSYNE_LOAD
}

}  // namespace mnemosyne::proxy
