// Kernels for what torch has none for: they break the device, or are launched
// with what a plain launch has not. The functions below are called by ctypes,
// in a process that has the proxy's client and a runtime loaded.
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

namespace {

constexpr int kThreads = 128;

}  // namespace

struct Large {  // a launch has room for 32,764 bytes
  int values[7500];
};

extern "C" __global__ void endless(const volatile int* stop) {
  while (*stop == 0) {
  }
}

extern "C" __global__ void wild(uint64_t address) {
  *reinterpret_cast<volatile int*>(address) = 1;
}

extern "C" __global__ void failing() { assert(false); }

extern "C" __global__ void takeLarge(int* to, Large from) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < 7500) to[i] = from.values[i];
}

// Each block: which of its cluster it is, and of how many hundreds.
extern "C" __global__ void clustered(int* to, int size) {
  unsigned rank = 0, blocks = size;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
#endif
  if (threadIdx.x == 0) to[blockIdx.x] = rank + 100 * blocks;
}

extern "C" __global__ void reverse(int* to, int count) {
  extern __shared__ int shared[];
  for (int i = threadIdx.x; i < count; i += blockDim.x) shared[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    to[i] = shared[count - 1 - i];
  }
}

// Late, so that a second one that does not wait reads what was there before.
extern "C" __global__ void first(int* values, int count) {
  const long long begin = clock64();
  while (clock64() - begin < 1'000'000) {
  }
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) values[i] = i;
}

extern "C" __global__ void second(const int* values, int* to, int count) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = values[i] + 1;
}

// Each gives a cudaError_t.

extern "C" int launchEndless(const int* stop) {
  endless<<<1, 1>>>(stop);
  return cudaGetLastError();
}

extern "C" int launchWild(uint64_t address) {
  wild<<<1, 1>>>(address);
  return cudaGetLastError();
}

extern "C" int launchFailing() {
  failing<<<1, 1>>>();
  return cudaGetLastError();
}

// 7500 numbers, each three times its index.
extern "C" int launchLarge(int* to) {
  Large from;
  for (int i = 0; i < 7500; ++i) from.values[i] = 3 * i;
  takeLarge<<<(7500 + kThreads - 1) / kThreads, kThreads>>>(to, from);
  return cudaGetLastError();
}

extern "C" int launchClustered(int* to, int blocks, int size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, clustered, to, size);
}

// With more shared memory than a kernel has that nobody gave it to. Once is
// enough, says CUDA, so a new server has to be told by the proxy.
extern "C" int allowShared(int bytes) {
  return cudaFuncSetAttribute(
      reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

extern "C" int launchReverse(int* to, int count) {
  reverse<<<1, kThreads, count * sizeof(int)>>>(to, count);
  return cudaGetLastError();
}

// The second may begin before the first has ended, and waits for it in itself.
extern "C" int launchDependent(int* values, int* to, int count) {
  const int blocks = (count + kThreads - 1) / kThreads;
  first<<<blocks, kThreads>>>(values, count);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, second, static_cast<const int*>(values),
                            to, count);
}
