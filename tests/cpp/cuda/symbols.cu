// Variables of the device that the host writes and reads by their names.
#include <cstring>

#include "check.h"

__device__ int counters[8] = {1, 2, 3, 4, 5, 6, 7, 8};
__constant__ float factors[4];

int main() {
  int read[8];
  CHECK(cudaMemcpyFromSymbol(read, counters, sizeof read));
  for (int i = 0; i < 8; ++i) REQUIRE(read[i] == i + 1);
  const int written[2] = {70, 80};
  CHECK(cudaMemcpyToSymbol(counters, written, sizeof written, 6 * sizeof(int)));
  CHECK(cudaMemcpyFromSymbol(read, counters, sizeof read));
  REQUIRE(read[5] == 6 && read[6] == 70 && read[7] == 80);
  const float halves[4] = {0.5f, 1.0f, 1.5f, 2.0f};
  CHECK(cudaMemcpyToSymbol(factors, halves, sizeof halves));
  float back[4];
  CHECK(cudaMemcpyFromSymbol(back, factors, sizeof back));
  REQUIRE(std::memcmp(halves, back, sizeof back) == 0);
  void* at = nullptr;
  CHECK(cudaGetSymbolAddress(&at, counters));
  CHECK(cudaMemset(at, 0, sizeof read));
  size_t size = 0;
  CHECK(cudaGetSymbolSize(&size, counters));
  REQUIRE(size == sizeof read);
  CHECK(cudaMemcpyFromSymbol(read, counters, sizeof read));
  REQUIRE(read[0] == 0 && read[7] == 0);
  std::puts("all is well");
  return 0;
}
