#include "proxy/emulated/library.h"

#include <cstring>
#include <utility>

#include "proxy/emulated/registry.h"

namespace mnemosyne::proxy::emulated {
namespace {

constexpr int kInvalidImage = 200;
constexpr uint32_t kFatBinary = 0xba55ed50;
constexpr uint32_t kElf = 0x464c457f;

constexpr uint32_t kWrapper = 0x466243b1;
constexpr uint32_t kPtx = 0x65762e;  // .ve, of .version
constexpr size_t kVariableAlignment = 256;

std::optional<KernelTable> tableOf(const void* code) {
  try {
    return FatBinary::at(code).kernels(10 * deviceAttribute(75) +
                                       deviceAttribute(76));
  } catch (const FatBinaryError&) {
    return std::nullopt;
  }
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
  if (magic != kFatBinary && magic != kElf && magic != kWrapper &&
      (magic & 0xffffff) != kPtx) {
    return kInvalidImage;
  }
  auto loaded = std::make_unique<Library>();
  loaded->told = tableOf(code);
  std::lock_guard<std::mutex> lock(mutex_);
  *library = loaded.get();
  libraries_[*library] = std::move(loaded);
  return kCudaSuccess;
}

int Libraries::unload(void* library, Memory& memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = libraries_.find(library);
  if (found == libraries_.end()) return kCudaInvalidHandle;
  for (const auto& [name, kernel] : found->second->kernels) {
    kernels_.erase(kernel.get());
  }
  const Library& unloaded = *found->second;
  if (unloaded.memory != 0) {
    memory.unmap(unloaded.memory, unloaded.memory_bytes);
    memory.release(unloaded.memory_handle);
    memory.free(unloaded.memory, unloaded.memory_bytes);
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
    if (told.has_value() && told->kernels.contains(name)) {
      made->parameters = told->kernels.at(name).parameters;
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

int Libraries::makeVariables(Library& library, Memory& memory) {
  size_t size_bytes = 0;
  std::map<std::string, size_t> places;
  for (const auto& [name, bytes] : library.told->variables) {
    places[name] = size_bytes;
    size_bytes += (bytes + kVariableAlignment - 1) / kVariableAlignment *
                  kVariableAlignment;
  }
  size_bytes = (size_bytes + kGranularityBytes - 1) / kGranularityBytes *
               kGranularityBytes;
  uint64_t address, handle;
  if (const int error = memory.create(size_bytes, &handle)) return error;
  int error = memory.reserve(size_bytes, 0, &address);
  if (error == kCudaSuccess) error = memory.map(address, size_bytes, 0, handle);
  if (error == kCudaSuccess)
    error = memory.setAccess(address, size_bytes, true);
  if (error != kCudaSuccess) return error;
  for (const auto& [name, value] : library.told->initial_values) {
    std::memcpy(reinterpret_cast<void*>(address + places[name]), value.data(),
                value.size());
  }
  library.memory = address;
  library.memory_handle = handle;
  library.memory_bytes = size_bytes;
  library.places = std::move(places);
  return kCudaSuccess;
}

int Libraries::variable(void* library, const std::string& name, Memory& memory,
                        uint64_t* address, size_t* size_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = libraries_.find(library);
  if (found == libraries_.end()) return kCudaInvalidHandle;
  Library& in = *found->second;
  if (!in.told.has_value() || !in.told->variables.contains(name)) {
    return kCudaNotFound;
  }
  if (in.memory == 0) {
    if (const int error = makeVariables(in, memory)) return error;
  }
  *address = in.memory + in.places.at(name);
  *size_bytes = in.told->variables.at(name);
  return kCudaSuccess;
}

}  // namespace mnemosyne::proxy::emulated
