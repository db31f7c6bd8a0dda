// The kernels of kernels.cu as functions of the host, so that the checks
// themselves can be tried on the emulated device.
#include "proxy/emulated/kernels.h"

#include <unistd.h>

namespace {

using mnemosyne::proxy::kCudaAssert;
using mnemosyne::proxy::kCudaIllegalAddress;
using mnemosyne::proxy::emulated::Launch;
using mnemosyne::proxy::emulated::onHost;
using mnemosyne::proxy::emulated::RegisterKernel;

struct Large {
  int values[7500];
};

void endless(const Launch&, const int* stop) {
  while (*static_cast<const volatile int*>(stop) == 0) usleep(1000);
}

void wild(const Launch& launch, uint64_t) { launch.fail(kCudaIllegalAddress); }

void failing(const Launch& launch) { launch.fail(kCudaAssert); }

void takeLarge(const Launch&, int* to, Large from) {
  std::memcpy(to, from.values, sizeof from.values);
}

void clustered(const Launch& launch, int* to, int size) {
  const int blocks = static_cast<int>(launch.grid.x);
  for (int block = 0; block < blocks; ++block) {
    to[block] = block % size + 100 * size;
  }
}

void reverse(const Launch& launch, int* to, int count) {
  if (launch.shared_bytes < count * sizeof(int)) {
    return launch.fail(kCudaIllegalAddress);
  }
  for (int i = 0; i < count; ++i) to[i] = count - 1 - i;
}

void first(const Launch&, int* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = i;
}

void second(const Launch&, const int* values, int* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = values[i] + 1;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void
mnemosyne_register_kernels(RegisterKernel* registerKernel) {
  registerKernel("endless", onHost<endless>);
  registerKernel("wild", onHost<wild>);
  registerKernel("failing", onHost<failing>);
  registerKernel("takeLarge", onHost<takeLarge>);
  registerKernel("clustered", onHost<clustered>);
  registerKernel("reverse", onHost<reverse>);
  registerKernel("first", onHost<first>);
  registerKernel("second", onHost<second>);
}
