#include "ccl/event_loop.h"

#include <algorithm>
#include <cerrno>

#include "common/error.h"

namespace mnemosyne::ccl {
namespace {

epoll_event eventFor(EventSink* sink) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.ptr = sink;
  return event;
}

}  // namespace

EventLoop::EventLoop()
    : epoll_(Fd::make([] { return ::epoll_create1(EPOLL_CLOEXEC); })) {
  if (!epoll_) throwErrno("epoll_create1");
}

void EventLoop::watch(int fd, EventSink* sink) {
  epoll_event event = eventFor(sink);
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
    throwErrno("epoll_ctl");
}

void EventLoop::hand(int fd, EventSink* sink) {
  epoll_event event = eventFor(sink);
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) != 0)
    throwErrno("epoll_ctl");
}

void EventLoop::forget(int fd) {
  if (fd >= 0) (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

int EventLoop::fetch(Events* events, int timeout_ms) {
  const int count = ::epoll_wait(epoll_.get(), events->data(),
                                 static_cast<int>(events->size()), timeout_ms);
  if (count < 0 && errno != EINTR) throwErrno("epoll_wait");
  return std::max(count, 0);
}

void EventLoop::wait(Deadline deadline) {
  num_seen_ = fetch(&seen_, deadline.remainingMs());
}

void EventLoop::tell() {
  for (int i = 0; i < num_seen_; ++i)
    static_cast<EventSink*>(seen_[i].data.ptr)->onEvents(seen_[i].events);
  num_seen_ = 0;
}

void EventLoop::poll() {
  Events events;
  const int count = fetch(&events, 0);
  for (int i = 0; i < count; ++i)
    static_cast<EventSink*>(events[i].data.ptr)->onEvents(events[i].events);
}

}  // namespace mnemosyne::ccl
