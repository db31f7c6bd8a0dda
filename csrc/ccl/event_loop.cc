#include "ccl/event_loop.h"

#include <sys/epoll.h>

#include <array>
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

void EventLoop::poll(Deadline deadline) {
  graveyard_.clear();  // all events that were fetched have been told
  std::array<epoll_event, 64> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(),
                                 deadline.remainingMs());
  if (count < 0 && errno != EINTR) throwErrno("epoll_wait");
  for (int i = 0; i < count; ++i)
    static_cast<EventSink*>(events[i].data.ptr)->onEvents(events[i].events);
}

}  // namespace mnemosyne::ccl
