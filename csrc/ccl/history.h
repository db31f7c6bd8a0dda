// What the last operations were and how they ended: for who looks into a hang,
// or into a job that is slow.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ccl/group.h"
#include "ccl/operation.h"
#include "common/deadline.h"

namespace mnemosyne::ccl {

enum class Outcome : uint8_t { kCompleted, kFailed, kAbsorbed };

struct Finished {
  std::shared_ptr<const Group> group;
  Kind kind = Kind::kBarrier;
  Outcome outcome = Outcome::kCompleted;
  const char* type_name = "";
  uint64_t sequence = 0;
  size_t num_bytes = 0;
  Clock::time_point began;
  Clock::time_point ended;
  std::string error;  // what the waiting thread was told, or was spared
};

// A ring. Its memory is taken once: adding what has completed costs none.
class History {
 public:
  void add(Finished one) { ring_[num_++ % ring_.size()] = std::move(one); }

  // Oldest first.
  std::vector<Finished> all() const {
    std::vector<Finished> list;
    for (size_t n = num_ - std::min(num_, ring_.size()); n < num_; ++n)
      list.push_back(ring_[n % ring_.size()]);
    return list;
  }

 private:
  size_t num_ = 0;  // added ever
  std::array<Finished, 256> ring_;
};

}  // namespace mnemosyne::ccl
