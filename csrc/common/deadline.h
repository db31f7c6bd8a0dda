// A point on the monotonic clock until which something may take.
#pragma once

#include <algorithm>
#include <chrono>

namespace mnemosyne {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

class Deadline {
 public:
  static Deadline in(Milliseconds time) {
    return Deadline(Clock::now() + time);
  }
  static Deadline never() { return Deadline(Clock::time_point::max()); }

  bool expired() const { return at_ != never().at_ && Clock::now() >= at_; }

  // Milliseconds left, rounded up so that a sleep of that long reaches it; at
  // most an hour, which is what epoll_wait is given when nothing is due.
  int remainingMs() const {
    constexpr auto kHour = std::chrono::hours(1);
    const auto now = Clock::now();
    if (at_ <= now) return 0;
    if (at_ - now >= kHour) return Milliseconds(kHour).count();
    return static_cast<int>(std::chrono::ceil<Milliseconds>(at_ - now).count());
  }

  // When it was made, by in(before).
  Clock::time_point begin(Milliseconds before) const { return at_ - before; }

  bool operator<(const Deadline& other) const { return at_ < other.at_; }

 private:
  explicit Deadline(Clock::time_point at) : at_(at) {}
  Clock::time_point at_;
};

}  // namespace mnemosyne
