// A receive in the queue for point-to-point messages of one group and tag.
#pragma once

#include <coroutine>
#include <cstdint>

#include "ccl/operation.h"

namespace mnemosyne::ccl {

class Mesh;

// `co_await` waits until it is settled from which rank the operation receives,
// and which of that rank's messages. At once, unless a receive from any rank is
// in question: that one waits until there is a message, and those behind it for
// it.
class Turn {
 public:
  // `from`: a rank, or -1 for any.
  Turn(Operation& op, int from);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  int source() const { return source_; }

  bool await_ready() const { return source_ >= 0; }
  void await_suspend(std::coroutine_handle<>) { op_.awaited_ = this; }
  void await_resume() const {}

 private:
  friend class Mesh;
  // Takes the next message from `rank`.
  void settle(int rank);

  Operation& op_;
  const int from_;
  int source_ = -1;
  bool is_queued_ = false;
};

}  // namespace mnemosyne::ccl
