// What the emulated device exports, declared as our server calls it, and what
// its tests share. Each test has the device in a process of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "proxy/cuda_abi.h"
#include "proxy/emulated/kernels.h"

extern "C" {
using DevicePointer = unsigned long long;
int cuInit(unsigned);
int cuDriverGetVersion(int*);
int cuDeviceGetAttribute(int*, int, int);
int cuDeviceGetCount(int*);
int cuDeviceGetUuid_v2(void*, int);
int cudaGetDeviceProperties(void*, int);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuCtxSynchronize();
int cuGetProcAddress_v2(const char*, void**, int, uint64_t, int*);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemAddressReserve(DevicePointer*, size_t, size_t, DevicePointer,
                        unsigned long long);
int cuMemAddressFree(DevicePointer, size_t);
int cuMemCreate(unsigned long long*, size_t,
                const mnemosyne::proxy::AllocationProperties*,
                unsigned long long);
int cuMemRelease(unsigned long long);
int cuMemMap(DevicePointer, size_t, size_t, unsigned long long,
             unsigned long long);
int cuMemUnmap(DevicePointer, size_t);
int cuMemSetAccess(DevicePointer, size_t,
                   const mnemosyne::proxy::AccessDescriptor*, size_t);
int cuMemHostRegister_v2(void*, size_t, unsigned);
int cuMemHostUnregister(void*);
int cuMemcpyHtoDAsync_v2(DevicePointer, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, DevicePointer, size_t, void*);
int cuMemcpyDtoDAsync_v2(DevicePointer, DevicePointer, size_t, void*);
int cuMemcpyAsync(DevicePointer, DevicePointer, size_t, void*);
int cuMemcpy2DAsync_v2(const void*, void*);
int cuMemsetD8Async(DevicePointer, unsigned char, size_t, void*);
int cuMemsetD16Async(DevicePointer, unsigned short, size_t, void*);
int cuMemsetD32Async(DevicePointer, unsigned, size_t, void*);
int cuStreamCreateWithPriority(void**, unsigned, int);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamQuery(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuStreamWriteValue64_v2(void*, DevicePointer, uint64_t, unsigned);
int cuLaunchHostFunc(void*, void (*)(void*), void*);
int cuEventCreate(void**, unsigned);
int cuEventRecord(void*, void*);
int cuEventQuery(void*);
int cuEventSynchronize(void*);
int cuEventElapsedTime(float*, void*, void*);
int cuEventDestroy_v2(void*);
int cuLibraryLoadData(void**, const void*, int*, void**, unsigned, int*, void**,
                      unsigned);
int cuLibraryGetKernel(void**, void*, const char*);
int cuLibraryUnload(void*);
int cuLibraryGetGlobal(DevicePointer*, size_t*, void*, const char*);
int cuKernelGetFunction(void**, void*);
int cuKernelGetParamInfo(void*, size_t, size_t*, size_t*);
int cuLaunchKernelEx(const mnemosyne::proxy::LaunchConfig*, void*, void**,
                     void**);
void mnemosyne_emulated_register_kernel(const char*,
                                        mnemosyne::proxy::emulated::Kernel*);
size_t mnemosyne_emulated_num_skipped();
}

namespace mnemosyne::testing {

// Runs the body in a child process whose device is as `options` say, and throws
// what it throws. `death` is the signal that the child shall end by, 0 for
// none.
void withDevice(const std::string& options, const std::function<void()>& body,
                int death = 0, const std::string& generation = "");

// Runs one body per rank, each in a process, all at once. Throws if one does,
// or is still there after 60 s.
void withRanks(int num_ranks, const std::function<void(int rank)>& body);

// Makes the device's context current; throws unless all goes well.
void openContext();

// Throws unless `error` is 0.
void check(int error, const char* what, int line);

// Device memory; openContext() came before.
class Allocation {
 public:
  explicit Allocation(size_t size_bytes);
  ~Allocation();
  Allocation(const Allocation&) = delete;
  DevicePointer address() const { return address_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(address_);
  }

 private:
  size_t size_bytes_;
  unsigned long long handle_ = 0;
  DevicePointer address_ = 0;
};

template <typename T>
std::vector<T> download(DevicePointer from, size_t count) {
  std::vector<T> values(count);
  check(cuMemcpyDtoHAsync_v2(values.data(), from, count * sizeof(T), nullptr),
        "download", __LINE__);
  return values;
}

template <typename T>
void upload(DevicePointer to, const std::vector<T>& values) {
  check(cuMemcpyHtoDAsync_v2(to, values.data(), values.size() * sizeof(T),
                             nullptr),
        "upload", __LINE__);
  // It was read, but may not have arrived for other streams yet.
  check(cuStreamSynchronize(nullptr), "upload", __LINE__);
}

// A gate that stops a stream until the test opens it.
class Gate {
 public:
  explicit Gate(void* stream);
  void open();

 private:
  int fds_[2];
};

}  // namespace mnemosyne::testing

#define CHECK(call) mnemosyne::testing::check((call), #call, __LINE__)
