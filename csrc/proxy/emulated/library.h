// Fat binaries that were loaded, and their kernels.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "proxy/cuda_abi.h"
#include "proxy/emulated/memory.h"
#include "proxy/emulated/properties.h"
#include "proxy/fat_binary.h"

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
  int unload(void* library, Memory& memory);
  int kernel(void* library, const std::string& name, bool any_name,
             void** kernel);
  // Where a variable lies, and its size. A library gets memory for all of its
  // variables when the first one is asked for.
  int variable(void* library, const std::string& name, Memory& memory,
               uint64_t* address, size_t* size_bytes);

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
    std::optional<KernelTable> told;
    std::map<std::string, std::unique_ptr<LoadedKernel>> kernels;
    // The variables' memory, and where in it each of them lies.
    uint64_t memory = 0;
    uint64_t memory_handle = 0;
    size_t memory_bytes = 0;
    std::map<std::string, size_t> places;
  };

  static int makeVariables(Library& library, Memory& memory);

  std::mutex mutex_;  // of all below
  std::map<void*, std::unique_ptr<Library>> libraries_;
  std::map<const void*, LoadedKernel*> kernels_;
};

Libraries& libraries();

}  // namespace mnemosyne::proxy::emulated
