// What a program does with the runtime besides training: copies of every kind,
// streams and events that order them, kernels with all sorts of parameters.
#include <algorithm>
#include <thread>
#include <vector>

#include "check.h"

namespace {

constexpr int kCount = 100'003;  // no multiple of a block
constexpr size_t kBytes = kCount * sizeof(float);
constexpr int kThreads = 256;
constexpr int kBlocks = (kCount + kThreads - 1) / kThreads;

}  // namespace

struct Affine {  // with gaps
  signed char sign;
  double factor;
  float offset;
};
struct Table {  // above 4 KiB
  float values[1200];
};

__global__ void add(const float* a, const float* b, float* sum, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) sum[i] = a[i] + b[i];
}

__global__ void transform(float* values, Affine by, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  values[i] = by.sign * static_cast<float>(by.factor) * values[i] + by.offset;
}

__global__ void lookUp(float* values, Table table, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) values[i] = table.values[i % 1200];
}

template <typename T>
__global__ void fill(T* values, T value, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) values[i] = value;
}

// One sum for each block, by way of shared memory.
__global__ void sumBlocks(const int* values, int* sums, int count) {
  extern __shared__ int shared[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = i < count ? values[i] : 0;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

__global__ void nothing() {}

namespace {

void devicesAreThere() {
  int count = 0;
  CHECK(cudaGetDeviceCount(&count));
  REQUIRE(count >= 1);
  CHECK(cudaSetDevice(0));
  int device = -1;
  CHECK(cudaGetDevice(&device));
  REQUIRE(device == 0);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  REQUIRE(properties.major >= 7);
  int warp = 0;
  CHECK(cudaDeviceGetAttribute(&warp, cudaDevAttrWarpSize, 0));
  REQUIRE(warp == 32);
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total));
  REQUIRE(free > 0 && free <= total);
}

// Two streams, of which the second waits for an event of the first.
void streamsWaitForEvents() {
  float *a, *b, *sum;  // pinned
  CHECK(cudaMallocHost(&a, kBytes));
  CHECK(cudaMallocHost(&b, kBytes));
  CHECK(cudaHostAlloc(&sum, kBytes, cudaHostAllocDefault));
  float *device_a, *device_b, *device_sum;
  CHECK(cudaMalloc(&device_a, kBytes));
  CHECK(cudaMalloc(&device_b, kBytes));
  CHECK(cudaMalloc(&device_sum, kBytes));
  cudaStream_t first, second;
  CHECK(cudaStreamCreate(&first));
  CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
  cudaEvent_t begin, added, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreateWithFlags(&added, cudaEventDisableTiming));
  CHECK(cudaEventCreate(&end));
  for (int round = 1; round <= 3; ++round) {
    for (int i = 0; i < kCount; ++i) {
      a[i] = static_cast<float>(i * round);
      b[i] = static_cast<float>(i + round);
    }
    CHECK(cudaEventRecord(begin, first));
    CHECK(cudaMemcpyAsync(device_a, a, kBytes, cudaMemcpyHostToDevice, first));
    CHECK(cudaMemcpyAsync(device_b, b, kBytes, cudaMemcpyHostToDevice, first));
    add<<<kBlocks, kThreads, 0, first>>>(device_a, device_b, device_sum,
                                         kCount);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(added, first));
    CHECK(cudaStreamWaitEvent(second, added, 0));
    transform<<<kBlocks, kThreads, 0, second>>>(device_sum,
                                                Affine{-1, 2.0, 0.5f}, kCount);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpyAsync(sum, device_sum, kBytes, cudaMemcpyDefault, second));
    CHECK(cudaEventRecord(end, second));
    cudaError_t state;
    while ((state = cudaEventQuery(end)) == cudaErrorNotReady) {
      std::this_thread::yield();
    }
    CHECK(state);
    CHECK(cudaEventSynchronize(end));
    float elapsed_ms = -1;
    CHECK(cudaEventElapsedTime(&elapsed_ms, begin, end));
    REQUIRE(elapsed_ms >= 0);
    for (int i = 0; i < kCount; ++i) {
      REQUIRE(sum[i] == -2.0f * (a[i] + b[i]) + 0.5f);
    }
  }
  CHECK(cudaStreamSynchronize(first));
  CHECK(cudaStreamQuery(second));
  for (cudaEvent_t event : {begin, added, end}) CHECK(cudaEventDestroy(event));
  for (cudaStream_t stream : {first, second}) CHECK(cudaStreamDestroy(stream));
  for (float* at : {device_a, device_b, device_sum}) CHECK(cudaFree(at));
  for (float* at : {a, b, sum}) CHECK(cudaFreeHost(at));
}

// Memory that is not pinned, within the device, parts of an allocation, and
// more than fits into any buffer in between.
void copiesKeepEveryByte() {
  const size_t size = (size_t{9} << 20) + 5;
  std::vector<unsigned char> from(size), to(size);
  for (size_t i = 0; i < size; ++i) {
    from[i] = static_cast<unsigned char>(i * 2654435761u >> 13);
  }
  unsigned char *one, *other;
  CHECK(cudaMalloc(&one, size));
  CHECK(cudaMalloc(&other, size));
  CHECK(cudaMemcpy(one, from.data(), size, cudaMemcpyHostToDevice));
  CHECK(cudaMemset(other, 0xa5, size));
  CHECK(cudaMemcpy(other + 3, one + 1, size - 10, cudaMemcpyDeviceToDevice));
  CHECK(cudaMemsetAsync(other + 100, 0, 50));
  CHECK(cudaMemcpy(to.data(), other, size, cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < size; ++i) {
    const bool is_copied = i >= 3 && i < size - 7;
    const bool is_cleared = i >= 100 && i < 150;
    const int expected = is_cleared ? 0 : is_copied ? from[i - 2] : 0xa5;
    REQUIRE(to[i] == expected);
  }
  // The source may change as soon as the call returns.
  std::vector<unsigned char> small(1000, 7);
  CHECK(cudaMemcpyAsync(one, small.data(), small.size(), cudaMemcpyDefault));
  std::fill(small.begin(), small.end(), 9);
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaMemcpy(small.data(), one, small.size(), cudaMemcpyDeviceToHost));
  REQUIRE(small.front() == 7 && small.back() == 7);
  cudaPointerAttributes attributes;
  CHECK(cudaPointerGetAttributes(&attributes, one + 5));
  REQUIRE(attributes.type == cudaMemoryTypeDevice);
  CHECK(cudaPointerGetAttributes(&attributes, small.data()));
  REQUIRE(attributes.type == cudaMemoryTypeUnregistered);
  CHECK(cudaFree(one));
  CHECK(cudaFree(other));
  CHECK(cudaFree(nullptr));
}

void kernelsGetTheirParameters() {
  int *values, *sums;
  float* looked_up;
  CHECK(cudaMalloc(&values, kCount * sizeof(int)));
  CHECK(cudaMalloc(&sums, kBlocks * sizeof(int)));
  CHECK(cudaMalloc(&looked_up, kBytes));
  nothing<<<1, 1>>>();
  fill<<<kBlocks, kThreads>>>(values, 3, kCount);
  sumBlocks<<<kBlocks, kThreads, kThreads * sizeof(int)>>>(values, sums,
                                                           kCount);
  CHECK(cudaGetLastError());
  Table table;
  for (int i = 0; i < 1200; ++i) table.values[i] = 0.25f * i;
  lookUp<<<kBlocks, kThreads>>>(looked_up, table, kCount);
  CHECK(cudaGetLastError());
  std::vector<int> all(kBlocks);
  CHECK(cudaMemcpy(all.data(), sums, kBlocks * sizeof(int),
                   cudaMemcpyDeviceToHost));
  int total = 0;
  for (const int sum : all) total += sum;
  REQUIRE(total == 3 * kCount);
  std::vector<float> found(kCount);
  CHECK(cudaMemcpy(found.data(), looked_up, kBytes, cudaMemcpyDeviceToHost));
  for (int i = 0; i < kCount; ++i) REQUIRE(found[i] == 0.25f * (i % 1200));

  // The same without the three brackets.
  int value = 5, count = kCount;
  void* arguments[] = {&values, &value, &count};
  CHECK(cudaLaunchKernel(fill<int>, dim3(kBlocks), dim3(kThreads), arguments, 0,
                         nullptr));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kThreads * sizeof(int);
  CHECK(cudaLaunchKernelEx(&config, sumBlocks, static_cast<const int*>(values),
                           sums, kCount));
  CHECK(cudaMemcpy(all.data(), sums, sizeof(int), cudaMemcpyDeviceToHost));
  REQUIRE(all[0] == 5 * kThreads);
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, sumBlocks));
  REQUIRE(attributes.maxThreadsPerBlock >= kThreads);
  CHECK(cudaFuncSetAttribute(
      sumBlocks, cudaFuncAttributeMaxDynamicSharedMemorySize, 32 << 10));
  CHECK(cudaFree(values));
  CHECK(cudaFree(sums));
  CHECK(cudaFree(looked_up));
}

}  // namespace

int main() {
  devicesAreThere();
  streamsWaitForEvents();
  copiesKeepEveryByte();
  kernelsGetTheirParameters();
  CHECK(cudaDeviceSynchronize());
  std::puts("all is well");
  return 0;
}
