#include "proxy/emulated/library.h"

#include <cstring>

#include "proxy/emulated/registry.h"

namespace mnemosyne::proxy::emulated {
namespace {

constexpr int kInvalidImage = 200;
constexpr uint32_t kFatBinary = 0xba55ed50;
constexpr uint32_t kElf = 0x464c457f;

// The kernels of a fat binary with their parameters.
std::optional<std::map<std::string, Parameters>> kernelsOf(const void*) {
  return std::nullopt;
}

}  // namespace

Libraries& libraries() {
  static auto* const all = new Libraries;
  return *all;
}

int Libraries::load(const void* code, void** library) {
  if (code == nullptr || library == nullptr) return kCudaInvalidValue;
  uint32_t magic;
  std::memcpy(&magic, code, sizeof magic);
  if (magic != kFatBinary && magic != kElf) return kInvalidImage;
  auto loaded = std::make_unique<Library>();
  loaded->told = kernelsOf(code);
  std::lock_guard<std::mutex> lock(mutex_);
  *library = loaded.get();
  libraries_[*library] = std::move(loaded);
  return kCudaSuccess;
}

int Libraries::unload(void* library) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = libraries_.find(library);
  if (found == libraries_.end()) return kCudaInvalidHandle;
  for (const auto& [name, kernel] : found->second->kernels) {
    kernels_.erase(kernel.get());
  }
  libraries_.erase(found);
  return kCudaSuccess;
}

int Libraries::kernel(void* library, const std::string& name, bool any_name,
                      void** to) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = libraries_.find(library);
  if (found == libraries_.end()) return kCudaInvalidHandle;
  auto& kernel = found->second->kernels[name];
  if (kernel == nullptr) {
    auto made = std::make_unique<LoadedKernel>();
    made->name = name;
    const auto& told = found->second->told;
    if (told.has_value() && told->contains(name)) {
      made->parameters = told->at(name);
    } else if (!any_name && registry().find(name) == nullptr) {
      found->second->kernels.erase(name);
      return kCudaNotFound;
    }
    kernel = std::move(made);
    kernels_[kernel.get()] = kernel.get();
  }
  *to = kernel.get();
  return kCudaSuccess;
}

}  // namespace mnemosyne::proxy::emulated
