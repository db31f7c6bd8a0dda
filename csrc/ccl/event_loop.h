// epoll, with an object behind each descriptor. All but wait() is called with
// the engine held.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/deadline.h"
#include "common/fd.h"

namespace mnemosyne::ccl {

class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void onEvents(uint32_t events) = 0;
};

class EventLoop {
 public:
  EventLoop();

  // `sink` gets the events of `fd`, edge-triggered. An event that has come
  // already is reported again when another sink takes over.
  void watch(int fd, EventSink* sink);
  void hand(int fd, EventSink* sink);
  // To be called before `fd` is closed: a child that is being forked may hold a
  // copy, with which epoll would go on to report events.
  void forget(int fd);

  // Destroys what is buried. Requires: no wait() that is not told yet.
  void clear() { graveyard_.clear(); }
  // Waits until something happens or `deadline`, without the engine. For one
  // thread only, which calls tell() next.
  void wait(Deadline deadline);
  // Tells the sinks what wait() has seen.
  void tell();
  // Tells the sinks what has happened by now. Any thread.
  void poll();

  // Destroys an object at the next clear(), when no event that was fetched can
  // be for it any more.
  template <typename T>
  void bury(std::unique_ptr<T> object) {
    graveyard_.push_back(std::move(object));
  }
  bool hasBuried() const { return !graveyard_.empty(); }

 private:
  using Events = std::array<epoll_event, 64>;
  int fetch(Events* events, int timeout_ms);

  Fd epoll_;
  Events seen_;  // by wait()
  int num_seen_ = 0;
  std::vector<std::shared_ptr<void>> graveyard_;
};

}  // namespace mnemosyne::ccl
