#include "ccl/backend_inner.h"

#include <utility>

#include "common/error.h"

namespace mnemosyne::ccl {
namespace {

GroupAborted aborted(const Group& group, int64_t life) {
  return GroupAborted(
      "group " + group.name() +
          " was aborted on its device; it is made anew when the "
          "job is repaired",
      group.globalRank(group.rank()), life);
}

}  // namespace

Inner::BackendPtr Inner::get(const Group& group, int64_t life) {
  if (BackendPtr ready = current()) return ready;
  std::lock_guard<std::mutex> making(making_mu_);
  {
    std::lock_guard<std::mutex> lock(mu_);
    if (is_aborted_) throw aborted(group, life);
    if (backend_) return backend_;
    is_making_ = true;
  }
  BackendPtr made;
  std::exception_ptr error;
  try {
    made = make_(group.id(), life, group.rank(), group.size());
  } catch (...) {
    error = std::current_exception();
  }
  bool is_late;
  {
    std::lock_guard<std::mutex> lock(mu_);
    is_making_ = false;
    is_late = is_aborted_;
    if (!error && !is_late) {
      backend_ = made;
      has_failed_ = false;
      standing_ = {life, true, 0, {}, {}};
      standing_.sent.resize(group.size());
      standing_.received.resize(group.size());
    }
  }
  if (error) std::rethrow_exception(error);
  if (!is_late) return made;
  made->abort();
  throw aborted(group, life);
}

Inner::BackendPtr Inner::current() const {
  std::lock_guard<std::mutex> lock(mu_);
  return is_aborted_ ? nullptr : backend_;
}

void Inner::note(const WorkPtr& work, int to, int from) {
  std::lock_guard<std::mutex> lock(mu_);
  if (to >= 0) {
    ++standing_.sent.at(to);
  } else if (from >= 0) {
    ++standing_.received.at(from);
  } else {
    ++standing_.collectives;
  }
  if (work) put(work);
}

void Inner::watch(const WorkPtr& work) {
  std::lock_guard<std::mutex> lock(mu_);
  put(work);
}

void Inner::wait() {
  std::deque<WorkPtr> flight;
  {
    std::lock_guard<std::mutex> lock(mu_);
    prune();
    flight = flight_;
  }
  for (const WorkPtr& work : flight) work->wait();
}

void Inner::put(const WorkPtr& work) {
  prune();
  flight_.push_back(work);
}

void Inner::prune() {
  while (!flight_.empty() && flight_.front()->isCompleted()) {
    has_failed_ |= flight_.front()->exception() != nullptr;
    flight_.pop_front();
  }
}

Inner::Standing Inner::standing() {
  std::lock_guard<std::mutex> lock(mu_);
  if (!backend_) return {};
  prune();
  Standing now = standing_;
  now.is_quiet = flight_.empty() && !has_failed_ && !is_aborted_;
  return now;
}

void Inner::abort() {
  BackendPtr backend;
  {
    std::lock_guard<std::mutex> lock(mu_);
    if (!backend_ && !is_making_) return;
    is_aborted_ = true;
    backend = backend_;
  }
  if (backend) backend->abort();
}

void Inner::drop() {
  std::lock_guard<std::mutex> making(making_mu_);
  BackendPtr backend;
  std::deque<WorkPtr> flight;
  std::lock_guard<std::mutex> lock(mu_);
  std::swap(backend, backend_);
  std::swap(flight, flight_);
  standing_ = {};
  is_aborted_ = has_failed_ = false;
}

}  // namespace mnemosyne::ccl
