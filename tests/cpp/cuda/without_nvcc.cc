// What nvcc makes of a small program, written by hand: it registers its device
// code (as text) and its kernel when it is loaded, and launches by the address
// of a function. It needs neither nvcc nor NVIDIA's headers or libraries: the
// functions come from the runtime that is preloaded.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../fat_binary_writer.h"
#include "proxy/cuda_abi.h"

using mnemosyne::proxy::Dim3;
using namespace mnemosyne::testing;

// Weak: where the program is linked, nobody has them.
#define RUNTIME extern "C" __attribute__((weak))
RUNTIME void** __cudaRegisterFatBinary(void* wrapper);
RUNTIME void __cudaRegisterFatBinaryEnd(void** handle);
RUNTIME void __cudaUnregisterFatBinary(void** handle);
RUNTIME void __cudaRegisterFunction(void** handle, const char* function,
                                    char* device_function,
                                    const char* device_name, int thread_limit,
                                    void*, void*, void*, void*, int*);
RUNTIME int cudaMalloc(void** at, size_t size);
RUNTIME int cudaFree(void* at);
RUNTIME int cudaMemcpy(void* to, const void* from, size_t size, int kind);
RUNTIME int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block,
                             void** parameters, size_t shared_bytes,
                             void* stream);
RUNTIME int cudaDeviceSynchronize();

namespace {

const char kAdd[] = "_Z3addPKfS0_Pfi";  // as in vector_add.cu
const char kCode[] = R"ptx(
.version 7.0
.target sm_80
.address_size 64
.visible .entry _Z3addPKfS0_Pfi(
  .param .u64 a, .param .u64 b, .param .u64 sum, .param .u32 count)
{
  .reg .pred %p<2>;
  .reg .b32 %r<6>;
  .reg .f32 %f<4>;
  .reg .b64 %rd<8>;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.s32 %r4, %r1, %r2, %r3;
  ld.param.u32 %r5, [count];
  setp.ge.s32 %p1, %r4, %r5;
  @%p1 bra DONE;
  mul.wide.s32 %rd1, %r4, 4;
  ld.param.u64 %rd2, [a];
  ld.param.u64 %rd3, [b];
  ld.param.u64 %rd4, [sum];
  add.s64 %rd5, %rd2, %rd1;
  add.s64 %rd6, %rd3, %rd1;
  add.s64 %rd7, %rd4, %rd1;
  ld.global.f32 %f1, [%rd5];
  ld.global.f32 %f2, [%rd6];
  add.f32 %f3, %f1, %f2;
  st.global.f32 [%rd7], %f3;
DONE:
  ret;
}
)ptx";

// Its address stands for the kernel; it is never called.
void add() {}

class Module {
 public:
  Module() : code_(FatBinaryWriter().ptx(80, kCode).build()) {
    if (__cudaRegisterFatBinary == nullptr) {
      std::fputs("preload a runtime\n", stderr);
      std::exit(1);
    }
    wrapper_.data = code_.data();
    handle_ = __cudaRegisterFatBinary(&wrapper_);
    __cudaRegisterFunction(handle_, reinterpret_cast<const char*>(&add),
                           const_cast<char*>(kAdd), kAdd, -1, nullptr, nullptr,
                           nullptr, nullptr, nullptr);
    __cudaRegisterFatBinaryEnd(handle_);
  }
  ~Module() { __cudaUnregisterFatBinary(handle_); }

 private:
  const Bytes code_;
  FatBinaryWrapper wrapper_;
  void** handle_;
};
const Module module;

void check(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "%s: error %d\n", what, error);
  std::exit(1);
}

}  // namespace

int main() {
  int count = 1000;
  const size_t size = static_cast<size_t>(count) * sizeof(float);
  std::vector<float> host(count);
  for (int i = 0; i < count; ++i) host[i] = static_cast<float>(i);
  void *a, *sum;
  check(cudaMalloc(&a, size), "cudaMalloc");
  check(cudaMalloc(&sum, size), "cudaMalloc");
  check(cudaMemcpy(a, host.data(), size, 1), "cudaMemcpy");
  void* parameters[] = {&a, &a, &sum, &count};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(&add), Dim3{8, 1, 1},
                         Dim3{128, 1, 1}, parameters, 0, nullptr),
        "cudaLaunchKernel");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check(cudaMemcpy(host.data(), sum, size, 2), "cudaMemcpy");
  for (int i = 0; i < count; ++i) {
    if (host[i] == static_cast<float>(2 * i)) continue;
    std::fprintf(stderr, "%d + %d is not %g\n", i, i, host[i]);
    return 1;
  }
  check(cudaFree(a), "cudaFree");
  check(cudaFree(sum), "cudaFree");
  std::puts("all is well");
  return 0;
}
