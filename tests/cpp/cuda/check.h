// A program ends with the first thing that is not as it should be.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

inline void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "line %d: %s: %s (%d)\n", line, what,
               cudaGetErrorString(error), static_cast<int>(error));
  std::exit(1);
}
inline void require(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d: %s does not hold\n", line, what);
  std::exit(1);
}

#define CHECK(call) check((call), #call, __LINE__)
#define REQUIRE(condition) require((condition), #condition, __LINE__)
