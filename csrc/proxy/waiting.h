// When a wait began, where others see it, so that an endless one is noticed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace mnemosyne::proxy {

using WaitClock = std::atomic<int64_t>;  // ns of nowNs(); 0: nobody waits

inline int64_t nowNs() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::nanoseconds(now).count();
}

// Notes it until the wait is over.
class Waiting {
 public:
  explicit Waiting(WaitClock& since) : since_(since) {
    since_.store(nowNs(), std::memory_order_relaxed);
  }
  ~Waiting() { since_.store(0, std::memory_order_relaxed); }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  WaitClock& since_;
};

}  // namespace mnemosyne::proxy
