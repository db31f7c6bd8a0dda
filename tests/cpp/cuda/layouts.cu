// Every shape of parameters that a kernel may have; only the layout is of
// interest (fat_binary_test.cc).
#include "layouts.h"

__device__ float factor = 2;
__device__ int history[5][7];
__constant__ double2 weights[16];
__managed__ int shared_by_both;

extern "C" __global__ void noParameters() { history[0][threadIdx.x] = 1; }

extern "C" __global__ void scalars(char a, short b, int c, long long d, bool e,
                                   float f, double g) {
  factor += a + b + c + d + e + f + static_cast<float>(g + weights[3].x);
}

extern "C" __global__ void pointers(const float* __restrict__ in, float* out,
                                    int count) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < count) out[at] = in[at] * factor + shared_by_both;
}

extern "C" __global__ void structures(char before, Padded padded, Byte byte,
                                      Nested nested, float3 after) {
  *nested.pointers[2] = before + padded.value + byte.only + after.y;
}

extern "C" __global__ void aligned(int before,
                                   const __grid_constant__ Aligned map,
                                   char after, float* out) {
  *out = before + map.words[threadIdx.x] + after;
}

extern "C" __global__ void large(int before, Large large, float* out) {
  *out = before + large.bytes[threadIdx.x];
}

extern "C" __global__ void medium(Medium medium,
                                  const __grid_constant__ Aligned map,
                                  float* out) {
  *out = medium.bytes[threadIdx.x] + map.words[threadIdx.x];
}

template <typename T>
__global__ void fill(T* out, T value, unsigned count) {
  if (threadIdx.x < count) out[threadIdx.x] = value;
}
template __global__ void fill<float>(float*, float, unsigned);
template __global__ void fill<Padded>(Padded*, Padded, unsigned);

// Tells one image from another. The host's compiler must not see it.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
extern "C" __global__ void madeFor90a(int) {}
#elif defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
extern "C" __global__ void madeForFamily(int) {}
#endif
