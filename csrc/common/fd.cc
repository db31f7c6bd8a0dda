#include "common/fd.h"

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>

namespace mnemosyne {
namespace {

// Descriptors above are not tracked; a process with so many has raised its
// limits far beyond what one worker needs.
constexpr int kMaxTracked = 1 << 16;

// The child of a fork may only make async-signal-safe calls, so this is plain
// memory. All of it is guarded by the mutex, which the fork itself holds.
struct Registry {
  std::mutex mutex;
  std::array<bool, kMaxTracked> owned{};
  std::atomic<unsigned> generation{0};

  Registry();
};

Registry& registry() {
  static Registry* const instance =
      new Registry;  // never destroyed: see atfork
  return *instance;
}

void beforeFork() { registry().mutex.lock(); }

void afterForkInParent() { registry().mutex.unlock(); }

void afterForkInChild() {
  Registry& all = registry();
  for (int fd = 0; fd < kMaxTracked; ++fd) {
    if (all.owned[fd]) ::close(fd);
    all.owned[fd] = false;
  }
  all.generation.fetch_add(1);
  all.mutex.unlock();
}

Registry::Registry() {
  ::pthread_atfork(beforeFork, afterForkInParent, afterForkInChild);
}

}  // namespace

std::mutex& Fd::forkMutex() { return registry().mutex; }

Fd::Fd(int fd) : fd_(fd), generation_(registry().generation.load()) {
  if (fd >= 0 && fd < kMaxTracked) registry().owned[fd] = true;
}

void Fd::reset() {
  if (fd_ < 0) return;
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  const int fd = std::exchange(fd_, -1);
  if (generation_ != all.generation.load()) return;  // closed at the fork
  if (fd < kMaxTracked) all.owned[fd] = false;
  ::close(fd);
}

unsigned forkGeneration() { return registry().generation.load(); }

}  // namespace mnemosyne
