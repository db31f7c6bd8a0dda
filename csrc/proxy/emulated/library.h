// Fat binaries that were loaded, and their kernels.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "proxy/cuda_abi.h"
#include "proxy/emulated/properties.h"

namespace mnemosyne::proxy::emulated {

using Parameters = std::vector<KernelParameter>;

// CUkernel and CUfunction alike.
struct LoadedKernel {
  std::string name;
  // Nothing where the fat binary was not understood.
  std::optional<Parameters> parameters;
  int max_dynamic_shared_bytes = kSharedBytesPerBlock;
  int shared_memory_carveout = -1;
};

// Any thread may call any method. Handles are pointers to what is stored here.
class Libraries {
 public:
  // Returns a CudaError.
  int load(const void* code, void** library);
  int unload(void* library);
  int kernel(void* library, const std::string& name, bool any_name,
             void** kernel);

  // Calls body(LoadedKernel&) under the lock, if there is such a kernel.
  template <typename Body>
  int with(const void* kernel, Body&& body) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kernels_.find(kernel);
    if (found == kernels_.end()) return kCudaInvalidHandle;
    return body(*found->second);
  }

 private:
  struct Library {
    // What the fat binary tells, nothing if it was not understood.
    std::optional<std::map<std::string, Parameters>> told;
    std::map<std::string, std::unique_ptr<LoadedKernel>> kernels;
  };

  std::mutex mutex_;  // of all below
  std::map<void*, std::unique_ptr<Library>> libraries_;
  std::map<const void*, LoadedKernel*> kernels_;
};

Libraries& libraries();

}  // namespace mnemosyne::proxy::emulated
