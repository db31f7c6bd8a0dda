// Times calls of the CUDA runtime, whoever answers them: see proxy_call.py.
// Prints: ns of a thread's CPU time and of wall time per call that nobody waits
// for, us of wall time per call with its answer, and, where there is a server
// to lose, ms from its end to the device's memory being there again.
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

// Loses the server, and returns how many seconds it takes to have another.
static double recover(int (*wait)(void)) {
  int (*const recover)(int) =
      (int (*)(int))dlsym(RTLD_DEFAULT, "mnemosyne_proxy_recover");
  void (*const end)(void) =
      (void (*)(void))dlsym(RTLD_DEFAULT, "mnemosyne_proxy_kill");
  end();
  if (wait() == 0) return -1;  // that of the lost device, once it is seen
  const double before = seconds(CLOCK_MONOTONIC);
  return recover(60000) == 0 ? seconds(CLOCK_MONOTONIC) - before : -1;
}

int main(int argc, char** argv) {
  const int count = argc > 1 ? atoi(argv[1]) : 100000;
  const int has_server = argc > 2 && atoi(argv[2]) != 0;
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
  const double recovered = has_server ? recover(wait) : 0;
  if (recovered < 0) return 1;
  printf("%.1f %.1f %.3f %.3f\n", cpu / count * 1e9, wall / count * 1e9,
         waited / waits * 1e6, recovered * 1e3);
  return 0;
}
