// What the operations of the set-up gave, so that a newcomer can run the
// script's set-up alone. docs/design.md, "Set-up log".
//
// Lives on the progress thread, which is why it needs no lock.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ccl/operation.h"

namespace mnemosyne::ccl {

// Larger results are parameters, which a newcomer gets from its replicas.
constexpr size_t kMaxResultBytes = 64 * 1024;

class SetupLog {
 public:
  struct Entry {
    Kind kind = Kind::kBarrier;
    bool is_placeholder = true;  // too large, or never completed
    int32_t source_rank = -1;
    std::string bytes;
  };

  static SetupLog parse(const std::string& text);  // std::invalid_argument
  std::string serialize() const;

  // Makes room for the result of the group's next operation; returns its place.
  size_t reserve(const Operation& op);
  void record(const Operation& op, size_t place);

  // Answers the group's next operation: fills its outputs, or leaves them as
  // they are for a placeholder. Throws CollectiveMismatch if the log has
  // another one.
  void answer(Operation& op);

 private:
  struct Sequence {
    std::vector<Entry> entries;
    size_t next = 0;  // to be answered
  };
  std::map<std::string, Sequence> groups_;
};

}  // namespace mnemosyne::ccl
