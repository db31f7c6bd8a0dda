// NVIDIA's libraries, or the emulated device that exports the same functions.
// They are loaded by name at run time, each when its first function is asked
// for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "proxy/cuda_abi.h"
#include "proxy/forward.h"

namespace mnemosyne::proxy {

constexpr size_t kNumLibraries = 5;

class MissingLibrary : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Libraries {
 public:
  // `emulated`: the path of the emulated device, or empty for the real one.
  explicit Libraries(std::string emulated) : emulated_(std::move(emulated)) {}

  // All throw MissingLibrary, with the loader's words.
  void openAll();
  void* symbol(Library library, const char* name);

  template <typename Function>
  Function* function(Library library, const char* name) {
    return reinterpret_cast<Function*>(symbol(library, name));
  }

 private:
  void* open(Library library);  // Requires: mutex_ held.

  const std::string emulated_;
  std::mutex mutex_;
  std::array<void*, kNumLibraries> handles_{};
};

// The driver's functions that the server calls. Each returns a CUresult.
#define MNEMOSYNE_DRIVER_FUNCTIONS(F)                                       \
  F(cuInit, unsigned)                                                       \
  F(cuDriverGetVersion, int*)                                               \
  F(cuDeviceGetCount, int*)                                                 \
  F(cuDeviceGet, int*, int)                                                 \
  F(cuDeviceGetAttribute, int*, int, int)                                   \
  F(cuDeviceGetPCIBusId, char*, int, int)                                   \
  F(cuDeviceGetUuid_v2, void*, int)                                         \
  F(cuDeviceTotalMem_v2, size_t*, int)                                      \
  F(cuDevicePrimaryCtxRetain, void**, int)                                  \
  F(cuCtxSetCurrent, void*)                                                 \
  F(cuCtxSynchronize)                                                       \
  F(cuCtxGetStreamPriorityRange, int*, int*)                                \
  F(cuMemGetInfo_v2, size_t*, size_t*)                                      \
  F(cuMemAddressReserve, uint64_t*, size_t, size_t, uint64_t, uint64_t)     \
  F(cuMemCreate, uint64_t*, size_t, const AllocationProperties*, uint64_t)  \
  F(cuMemRelease, uint64_t)                                                 \
  F(cuMemMap, uint64_t, size_t, size_t, uint64_t, uint64_t)                 \
  F(cuMemUnmap, uint64_t, size_t)                                           \
  F(cuMemSetAccess, uint64_t, size_t, const AccessDescriptor*, size_t)      \
  F(cuMemHostRegister_v2, void*, size_t, unsigned)                          \
  F(cuMemHostUnregister, void*)                                             \
  F(cuMemcpyAsync, uint64_t, uint64_t, size_t, void*)                       \
  F(cuMemcpyHtoDAsync_v2, uint64_t, const void*, size_t, void*)             \
  F(cuMemcpyDtoHAsync_v2, void*, uint64_t, size_t, void*)                   \
  F(cuMemsetD8Async, uint64_t, uint8_t, size_t, void*)                      \
  F(cuMemsetD16Async, uint64_t, uint16_t, size_t, void*)                    \
  F(cuMemsetD32Async, uint64_t, uint32_t, size_t, void*)                    \
  F(cuStreamCreateWithPriority, void**, unsigned, int)                      \
  F(cuStreamDestroy_v2, void*)                                              \
  F(cuStreamSynchronize, void*)                                             \
  F(cuStreamQuery, void*)                                                   \
  F(cuStreamWaitEvent, void*, void*, unsigned)                              \
  F(cuStreamWriteValue64_v2, void*, uint64_t, uint64_t, unsigned)           \
  F(cuEventCreate, void**, unsigned)                                        \
  F(cuEventDestroy_v2, void*)                                               \
  F(cuEventRecord, void*, void*)                                            \
  F(cuEventQuery, void*)                                                    \
  F(cuEventSynchronize, void*)                                              \
  F(cuEventElapsedTime_v2, float*, void*, void*)                            \
  F(cuLibraryLoadData, void**, const void*, void*, void*, unsigned, void*,  \
    void*, unsigned)                                                        \
  F(cuLibraryGetKernel, void**, void*, const char*)                         \
  F(cuKernelGetFunction, void**, void*)                                     \
  F(cuKernelGetAttribute, int*, int, void*, int)                            \
  F(cuKernelSetAttribute, int, int, void*, int)                             \
  F(cuKernelGetParamInfo, void*, size_t, size_t*, size_t*)                  \
  F(cuLaunchKernelEx, const LaunchConfig*, void*, void**, void**)           \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int*, void*, int, \
    size_t, unsigned)                                                       \
  F(cuGetErrorName, int, const char**)

struct Driver {
  explicit Driver(Libraries& libraries);
#define MNEMOSYNE_DECLARE(name, ...) int (*name)(__VA_ARGS__);
  MNEMOSYNE_DRIVER_FUNCTIONS(MNEMOSYNE_DECLARE)
#undef MNEMOSYNE_DECLARE
};

}  // namespace mnemosyne::proxy
