// Times calls of the CUDA runtime, whoever answers them: see proxy_call.py.
// Prints: ns of a thread's CPU time and of wall time per call that nobody waits
// for, and us of wall time per call with its answer.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double seconds(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int argc, char** argv) {
  const int count = argc > 1 ? atoi(argv[1]) : 100000;
  int (*const allocate)(void**, size_t) =
      (int (*)(void**, size_t))dlsym(RTLD_DEFAULT, "cudaMalloc");
  int (*const fill)(void*, int, size_t, void*) =
      (int (*)(void*, int, size_t, void*))dlsym(RTLD_DEFAULT, "cudaMemsetAsync");
  int (*const wait)(void) =
      (int (*)(void))dlsym(RTLD_DEFAULT, "cudaDeviceSynchronize");
  void* at = NULL;
  if (allocate == NULL || fill == NULL || wait == NULL ||
      allocate(&at, 1 << 20) != 0 || wait() != 0) {
    fprintf(stderr, "no device: is the client preloaded?\n");
    return 1;
  }
  // In bursts that the ring holds, as a step's are.
  const int burst = 1000;
  double cpu = 0, wall = 0;
  for (int done = 0; done < count; done += burst) {
    const double cpu_before = seconds(CLOCK_THREAD_CPUTIME_ID);
    const double before = seconds(CLOCK_MONOTONIC);
    for (int i = 0; i < burst; ++i) {
      if (fill(at, i, 64, NULL) != 0) return 1;
    }
    cpu += seconds(CLOCK_THREAD_CPUTIME_ID) - cpu_before;
    wall += seconds(CLOCK_MONOTONIC) - before;
    if (wait() != 0) return 1;
  }
  const int waits = count / 20;
  const double before = seconds(CLOCK_MONOTONIC);
  for (int i = 0; i < waits; ++i) {
    if (fill(at, i, 64, NULL) != 0 || wait() != 0) return 1;
  }
  const double waited = seconds(CLOCK_MONOTONIC) - before;
  printf("%.1f %.1f %.3f\n", cpu / count * 1e9, wall / count * 1e9,
         waited / waits * 1e6);
  return 0;
}
