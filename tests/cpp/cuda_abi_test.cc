// Our declarations of CUDA's binary interface against NVIDIA's own, and the
// emulated device as a program calls it that was compiled with those. Built
// only where the headers are.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "proxy/cuda_abi.h"
#include "test.h"

namespace mnemosyne::testing {

// Of emulated_api.h, which declares NVIDIA's functions as we call them, and so
// cannot be included here.
void withDevice(const std::string& options, const std::function<void()>& body,
                int death, const std::string& generation);
void openContext();
void check(int error, const char* what, int line);
#define CHECK(call) check((call), #call, __LINE__)

namespace {

using namespace proxy;

static_assert(static_cast<int>(kCudaSuccess) == cudaSuccess);
static_assert(static_cast<int>(kCudaInvalidValue) == CUDA_ERROR_INVALID_VALUE);
static_assert(static_cast<int>(kCudaOutOfMemory) == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(static_cast<int>(kCudaNotInitialized) ==
              CUDA_ERROR_NOT_INITIALIZED);
static_assert(static_cast<int>(kCudaInitializationError) ==
              cudaErrorInitializationError);
static_assert(static_cast<int>(kCudaNoDevice) == cudaErrorNoDevice);
static_assert(static_cast<int>(kCudaInvalidDevice) == cudaErrorInvalidDevice);
static_assert(static_cast<int>(kCudaInvalidContext) ==
              CUDA_ERROR_INVALID_CONTEXT);
static_assert(static_cast<int>(kCudaEccUncorrectable) ==
              cudaErrorECCUncorrectable);
static_assert(static_cast<int>(kCudaInvalidHandle) ==
              CUDA_ERROR_INVALID_HANDLE);
static_assert(static_cast<int>(kCudaNotFound) == CUDA_ERROR_NOT_FOUND);
static_assert(static_cast<int>(kCudaNotReady) == cudaErrorNotReady);
static_assert(static_cast<int>(kCudaIllegalAddress) == cudaErrorIllegalAddress);
static_assert(static_cast<int>(kCudaLaunchTimeout) == cudaErrorLaunchTimeout);
static_assert(static_cast<int>(kCudaAssert) == cudaErrorAssert);
static_assert(static_cast<int>(kCudaLaunchFailure) == cudaErrorLaunchFailure);
static_assert(static_cast<int>(kCudaNotSupported) == cudaErrorNotSupported);
static_assert(static_cast<int>(kCudaUnknown) == cudaErrorUnknown);

static_assert(static_cast<int>(kMemcpyDefault) == cudaMemcpyDefault);
static_assert(static_cast<int>(kHostToDevice) == cudaMemcpyHostToDevice);
static_assert(static_cast<int>(kDeviceToHost) == cudaMemcpyDeviceToHost);
static_assert(static_cast<int>(kDeviceMemory) == cudaMemoryTypeDevice);
static_assert(static_cast<int>(kHostMemory) == cudaMemoryTypeHost);

#define SAME(ours, our_field, theirs, their_field)                            \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field) && \
                sizeof(ours::our_field) == sizeof(theirs::their_field))

static_assert(sizeof(Dim3) == sizeof(dim3));
static_assert(sizeof(PointerAttributes) == sizeof(cudaPointerAttributes));
SAME(PointerAttributes, type, cudaPointerAttributes, type);
SAME(PointerAttributes, device, cudaPointerAttributes, device);
SAME(PointerAttributes, device_pointer, cudaPointerAttributes, devicePointer);
SAME(PointerAttributes, host_pointer, cudaPointerAttributes, hostPointer);

static_assert(sizeof(FunctionAttributes) == sizeof(cudaFuncAttributes));
SAME(FunctionAttributes, shared_size_bytes, cudaFuncAttributes,
     sharedSizeBytes);
SAME(FunctionAttributes, max_threads_per_block, cudaFuncAttributes,
     maxThreadsPerBlock);
SAME(FunctionAttributes, num_registers, cudaFuncAttributes, numRegs);
SAME(FunctionAttributes, max_dynamic_shared_size_bytes, cudaFuncAttributes,
     maxDynamicSharedSizeBytes);
SAME(FunctionAttributes, preferred_shared_memory_carveout, cudaFuncAttributes,
     preferredShmemCarveout);

static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(sizeof(LaunchAttribute) == sizeof(cudaLaunchAttribute));
SAME(LaunchAttribute, id, CUlaunchAttribute, id);
SAME(LaunchAttribute, value, CUlaunchAttribute, value);

// The driver's configuration, and the runtime's, whose shared memory is wider.
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(sizeof(LaunchConfig) == sizeof(cudaLaunchConfig_t));
SAME(LaunchConfig, shared_memory_bytes, CUlaunchConfig, sharedMemBytes);
SAME(LaunchConfig, stream, CUlaunchConfig, hStream);
SAME(LaunchConfig, attributes, CUlaunchConfig, attrs);
SAME(LaunchConfig, num_attributes, CUlaunchConfig, numAttrs);
SAME(LaunchConfig, stream, cudaLaunchConfig_t, stream);
SAME(LaunchConfig, num_attributes, cudaLaunchConfig_t, numAttrs);
static_assert(offsetof(LaunchConfig, block) ==
              offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_memory_bytes) ==
              offsetof(cudaLaunchConfig_t, dynamicSmemBytes));

static_assert(sizeof(MemoryLocation) == sizeof(CUmemLocation));
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
SAME(AllocationProperties, type, CUmemAllocationProp, type);
SAME(AllocationProperties, requested_handle_types, CUmemAllocationProp,
     requestedHandleTypes);
SAME(AllocationProperties, location, CUmemAllocationProp, location);
static_assert(sizeof(AccessDescriptor) == sizeof(CUmemAccessDesc));
SAME(AccessDescriptor, flags, CUmemAccessDesc, flags);
static_assert(CU_MEM_ALLOCATION_TYPE_PINNED == 1);
static_assert(CU_MEM_LOCATION_TYPE_DEVICE == 1);
static_assert(CU_MEM_ACCESS_FLAGS_PROT_READWRITE == 3);

static_assert(kDevicePropertiesBytes == sizeof(cudaDeviceProp));

}  // namespace

TEST(the_device_says_the_same_of_itself_in_its_properties_and_attributes) {
  withDevice(
      "memory=3g",
      [] {
        openContext();
        cudaDeviceProp p;
        CHECK(cudaGetDeviceProperties(&p, 0));
        EXPECT_EQ(std::string(p.name),
                  std::string("Mnemosyne emulated device"));
        EXPECT_EQ(p.totalGlobalMem, size_t{3} << 30);
        const auto attribute = [](CUdevice_attribute id) {
          int value = -1;
          CHECK(cuDeviceGetAttribute(&value, id, 0));
          return value;
        };
        const std::vector<std::pair<size_t, CUdevice_attribute>> same = {
            {p.major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR},
            {p.minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR},
            {p.warpSize, CU_DEVICE_ATTRIBUTE_WARP_SIZE},
            {p.multiProcessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT},
            {p.maxThreadsPerBlock, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK},
            {p.maxThreadsDim[2], CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z},
            {p.maxGridSize[1], CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y},
            {p.sharedMemPerBlock,
             CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK},
            {p.sharedMemPerBlockOptin,
             CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN},
            {p.sharedMemPerMultiprocessor,
             CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR},
            {p.reservedSharedMemPerBlock,
             CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK},
            {p.regsPerBlock, CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK},
            {p.maxThreadsPerMultiProcessor,
             CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR},
            {p.maxBlocksPerMultiProcessor,
             CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR},
            {p.totalConstMem, CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY},
            {p.l2CacheSize, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE},
            {p.unifiedAddressing, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING},
            {p.canMapHostMemory, CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY},
            {p.concurrentKernels, CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS},
            {p.asyncEngineCount, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT},
            {p.hostRegisterSupported,
             CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED},
            {p.canUseHostPointerForRegisteredMem,
             CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM},
            {p.cooperativeLaunch, CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH},
            {p.clusterLaunch, CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH},
            {p.managedMemory, CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY},
            {p.textureAlignment, CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT},
        };
        for (const auto& [value, id] : same) {
          EXPECT_EQ(static_cast<int>(value), attribute(id));
        }
        EXPECT_EQ(p.major, 9);
        EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS),
                  1);
        EXPECT_EQ(
            attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED),
            1);
      },
      0, "");
}

TEST(structures_of_nvidia_s_are_understood) {
  withDevice(
      "",
      [] {
        openContext();
        constexpr size_t kSize = 2 << 20;
        CUmemAllocationProp properties = {};
        properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {0}};
        CUmemAccessDesc access = {};
        access.location = properties.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        CUmemGenericAllocationHandle handle;
        CUdeviceptr at;
        CHECK(cuMemCreate(&handle, kSize, &properties, 0));
        CHECK(cuMemAddressReserve(&at, kSize, 0, 0, 0));
        CHECK(cuMemMap(at, kSize, 0, handle, 0));
        CHECK(cuMemSetAccess(at, kSize, &access, 1));
        const char rows[] = "..ab....cd..";
        CUDA_MEMCPY2D plane = {};
        plane.srcXInBytes = 2;
        plane.srcMemoryType = CU_MEMORYTYPE_HOST;
        plane.srcHost = rows;
        plane.srcPitch = 6;
        plane.dstY = 1;
        plane.dstMemoryType = CU_MEMORYTYPE_DEVICE;
        plane.dstDevice = at;
        plane.dstPitch = 2;
        plane.WidthInBytes = 2;
        plane.Height = 2;
        CHECK(cuMemcpy2DAsync(&plane, CU_STREAM_LEGACY));
        CHECK(cuStreamWriteValue64(CU_STREAM_PER_THREAD, at + 8, 77, 0));
        CHECK(cuCtxSynchronize());
        char text[16];
        CHECK(cuMemcpyDtoHAsync(text, at, sizeof text, nullptr));
        EXPECT_EQ(std::string(text + 2, 4), std::string("abcd"));
        EXPECT_EQ(text[8], char{77});
        void* function = nullptr;
        CUdriverProcAddressQueryResult found;
        CHECK(cuGetProcAddress("cuMemcpy2DAsync", &function, 13000, 0, &found));
        EXPECT(function == reinterpret_cast<void*>(&cuMemcpy2DAsync));
        EXPECT_EQ(found, CU_GET_PROC_ADDRESS_SUCCESS);
      },
      0, "");
}

}  // namespace mnemosyne::testing
