// One message, as the algorithm that sends or receives it sees it.
#pragma once

#include <coroutine>
#include <cstddef>
#include <cstdint>

#include "ccl/frame.h"

namespace mnemosyne::ccl {

class Operation;
class Peer;

// Lives in the frame of an algorithm. `co_await` waits until all bytes are
// handed to the link, or have arrived. Destroying it earlier withdraws it: its
// memory is not touched again. Once done, it can be used for the next message.
class Transfer {
 public:
  Transfer() = default;
  ~Transfer() { withdraw(); }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;

  // `tag` tells the messages between two ranks within one operation apart.
  void send(Operation& op, int group_rank, uint64_t tag, const void* data,
            size_t size);
  void recv(Operation& op, int group_rank, uint64_t tag, void* data,
            size_t size);
  void withdraw();

  bool isPending() const { return is_pending_; }

  struct Awaiter {
    Transfer* transfer;
    bool await_ready() const { return !transfer->is_pending_; }
    void await_suspend(std::coroutine_handle<>) const;
    void await_resume() const {}
  };
  Awaiter operator co_await() { return {this}; }

 private:
  friend class Peer;
  friend class Operation;

  void start(Operation& op, int group_rank, uint64_t tag, std::byte* data,
             size_t size, bool is_send);
  void finish();  // by the peer, when the last byte has moved
  uint16_t op_signature() const;

  Operation* op_ = nullptr;
  Peer* peer_ = nullptr;
  MessageKey key_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  size_t moved_ = 0;
  bool is_pending_ = false;
  bool is_send_ = false;
  bool is_credited_ = false;
  // Neighbours in the peer's queue of messages that may be sent.
  Transfer* queue_next_ = nullptr;
  Transfer* queue_previous_ = nullptr;
  // Neighbours in the operation's list of pending transfers.
  Transfer* op_next_ = nullptr;
  Transfer* op_previous_ = nullptr;
};

}  // namespace mnemosyne::ccl
