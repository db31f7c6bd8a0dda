// epoll, with an object behind each descriptor. Used by the progress thread
// only.
#pragma once

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

  // Waits until something happens or `deadline`, then tells the sinks.
  void poll(Deadline deadline);

  // Destroys an object once no event that was fetched can be for it any more.
  template <typename T>
  void bury(std::unique_ptr<T> object) {
    graveyard_.push_back(std::move(object));
  }

 private:
  Fd epoll_;
  std::vector<std::shared_ptr<void>> graveyard_;
};

}  // namespace mnemosyne::ccl
