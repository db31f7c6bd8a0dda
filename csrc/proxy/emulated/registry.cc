#include "proxy/emulated/registry.h"

#include <dlfcn.h>
#include <fnmatch.h>

#include <cstdio>
#include <sstream>

#include "proxy/emulated/export.h"

namespace mnemosyne::proxy::emulated {

Registry& registry() {
  static auto* const all = new Registry;  // threads may outlive destructors
  return *all;
}

std::string Registry::load(const char* paths) {
  std::istringstream list(paths);
  for (std::string path; std::getline(list, path, ':');) {
    if (path.empty()) continue;
    // Never closed: its functions stay registered.
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return dlerror();
    auto* const announce = reinterpret_cast<void (*)(RegisterKernel*)>(
        dlsym(library, "mnemosyne_register_kernels"));
    if (announce == nullptr) {
      return path + " does not export mnemosyne_register_kernels";
    }
    announce([](const char* device_name, Kernel* kernel) {
      registry().add(device_name, kernel);
    });
  }
  return "";
}

void Registry::add(const std::string& device_name, Kernel* kernel) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (device_name.find('*') == std::string::npos) {
    kernels_[device_name] = kernel;
  } else {
    patterns_.emplace_back(device_name, kernel);
    matched_.clear();
  }
}

Kernel* Registry::find(const std::string& device_name) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto named = kernels_.find(device_name);
  if (named != kernels_.end()) return named->second;
  const auto [found, is_new] = matched_.try_emplace(device_name, nullptr);
  if (is_new) {
    for (const auto& [pattern, kernel] : patterns_) {
      // Mangled names have none of the other characters that are special.
      if (fnmatch(pattern.c_str(), device_name.c_str(), 0) != 0) continue;
      found->second = kernel;
      break;
    }
  }
  return found->second;
}

void Registry::skipped(const std::string& device_name) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_skipped_;
  if (skipped_.insert(device_name).second) {
    std::fprintf(stderr, "emulated device: no host function for kernel %s\n",
                 device_name.c_str());
  }
}

size_t Registry::numSkipped() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_skipped_;
}

}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy::emulated;

// For tests and tools that hold the emulated device in their own process.
MNEMOSYNE_EXPORT void mnemosyne_emulated_register_kernel(const char* name,
                                                         Kernel* kernel) {
  registry().add(name, kernel);
}

MNEMOSYNE_EXPORT size_t mnemosyne_emulated_num_skipped() {
  return registry().numSkipped();
}
