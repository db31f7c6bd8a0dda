// The binary interface of CUDA 13 as far as the proxy speaks it: our own
// declarations, so that nothing here needs a CUDA toolkit to compile.
// tests/cpp/cuda_abi_test.cc holds them against NVIDIA's headers where those
// are.
//
// Enumerations travel as int, handles as pointers: in the calling convention
// they are that. Only structures that are read or written here are declared.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemosyne::proxy {

// cudaError_t and CUresult use the same numbers for these.
enum CudaError : int {
  kCudaSuccess = 0,
  kCudaInvalidValue = 1,
  kCudaOutOfMemory = 2,
  kCudaNotInitialized = 3,
  kCudaInitializationError = 3,
  kCudaNoDevice = 100,
  kCudaInvalidDevice = 101,
  kCudaInvalidContext = 201,
  kCudaEccUncorrectable = 214,
  kCudaInvalidHandle = 400,
  kCudaNotFound = 500,
  kCudaNotReady = 600,
  kCudaIllegalAddress = 700,
  kCudaLaunchTimeout = 702,
  kCudaAssert = 710,
  kCudaLaunchFailure = 719,
  kCudaNotSupported = 801,
  kCudaUnknown = 999,
};

enum CublasStatus : int {
  kCublasSuccess = 0,
  kCublasNotInitialized = 1,
  kCublasInvalidValue = 7,
  kCublasExecutionFailed = 13,
  kCublasNotSupported = 15,
};

enum NcclResult : int {
  kNcclSuccess = 0,
  kNcclUnhandledCudaError = 1,
  kNcclSystemError = 2,
  kNcclInternalError = 3,
  kNcclInvalidArgument = 4,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
  kNcclInProgress = 7,
};

enum CudnnStatus : int { kCudnnSuccess = 0, kCudnnNotSupported = 3000 };

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

enum MemcpyKind : int {
  kHostToHost = 0,
  kHostToDevice = 1,
  kDeviceToHost = 2,
  kDeviceToDevice = 3,
  kMemcpyDefault = 4,
};

enum MemoryType : int {
  kUnregisteredMemory = 0,
  kHostMemory = 1,
  kDeviceMemory = 2,
};

struct PointerAttributes {  // cudaPointerAttributes
  int type;                 // MemoryType
  int device;
  void* device_pointer;
  void* host_pointer;
  int64_t reserved[8];
};
static_assert(sizeof(PointerAttributes) == 88);

struct FunctionAttributes {  // cudaFuncAttributes
  size_t shared_size_bytes;
  size_t const_size_bytes;
  size_t local_size_bytes;
  int max_threads_per_block;
  int num_registers;
  int ptx_version;
  int binary_version;
  int cache_mode_ca;
  int max_dynamic_shared_size_bytes;
  int preferred_shared_memory_carveout;
  int rest[23];
};
static_assert(sizeof(FunctionAttributes) == 144);

struct LaunchAttribute {  // cudaLaunchAttribute, CUlaunchAttribute
  int id;
  int padding;
  std::byte value[64];
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig {  // cudaLaunchConfig_t; CUlaunchConfig is laid out alike
  Dim3 grid;
  Dim3 block;
  uint32_t
      shared_memory_bytes;  // in the driver; the runtime has 64 bits at +24
  uint32_t padding;
  void* stream;
  const LaunchAttribute* attributes;
  uint32_t num_attributes;
  uint32_t padding2;
};
static_assert(sizeof(LaunchConfig) == 56);

struct MemoryLocation {  // CUmemLocation
  int type;              // 1: device
  int id;
};

struct AllocationProperties {  // CUmemAllocationProp
  int type;                    // 1: pinned, the only one there is
  int requested_handle_types;
  MemoryLocation location;
  void* win32_metadata;
  uint8_t flags[8];
};
static_assert(sizeof(AllocationProperties) == 32);

struct AccessDescriptor {  // CUmemAccessDesc
  MemoryLocation location;
  int flags;  // 3: read and write
};
static_assert(sizeof(AccessDescriptor) == 12);

constexpr size_t kDevicePropertiesBytes = 1008;  // cudaDeviceProp

struct NcclUniqueId {
  std::byte bytes[128];
};

// cublasLtMatmulAlgo_t is opaque to us, and small.
struct LtHeuristicResult {  // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(LtHeuristicResult) == 96);

// One entry of the parameters of a kernel, as its fat binary tells.
struct KernelParameter {
  uint32_t offset;
  uint32_t size_bytes;
  bool operator==(const KernelParameter&) const = default;
};

}  // namespace mnemosyne::proxy
