#include "ccl/backend_inner.h"

#include <algorithm>
#include <atomic>
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

std::atomic<bool> is_capturing{false};

// The base class throws.
bool tellsErrors(const c10d::Backend& backend) {
  return backend.getBackendName() == "nccl";
}

}  // namespace

Inner::BackendPtr Inner::get(const Group& group, int64_t life) {
  if (BackendPtr ready = current()) return ready;
  std::lock_guard<std::mutex> making(making_mu_);
  {
    std::lock_guard<std::mutex> lock(mu_);
    if (is_aborted_) throw aborted(group, life);
    if (backend_) return backend_;
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
    is_late = is_aborted_;
    if (!error && !is_late) {
      backend_ = made;
      has_failed_ = false;
      error_ = nullptr;
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

void Inner::meet(const Group& group) {
  std::lock_guard<std::mutex> meeting(meeting_mu_);
  int64_t life;
  {
    std::lock_guard<std::mutex> lock(mu_);
    if (have_met_) return;
    life = standing_.life;
  }
  meet_(group.id(), life, group.size());
  std::lock_guard<std::mutex> lock(mu_);
  if (standing_.life == life) have_met_ = true;
}

bool Inner::hasCollectives() const {
  std::lock_guard<std::mutex> lock(mu_);
  return standing_.collectives > 0 && !is_aborted_;
}

void Inner::note(const WorkPtr& work, int to, int from) {
  std::vector<WorkPtr> ended;
  std::lock_guard<std::mutex> lock(mu_);
  if (to >= 0) {
    ++standing_.sent.at(to);
  } else if (from >= 0) {
    ++standing_.received.at(from);
  } else {
    ++standing_.collectives;
  }
  ended = prune();
  if (work) flight_.push_back({work, nullptr, to >= 0 || from >= 0});
}

void Inner::setCapturing(bool on) { is_capturing = on; }

bool Inner::isCapturing() { return is_capturing; }

void Inner::noteCaptured() {
  std::lock_guard<std::mutex> lock(mu_);
  ++num_captured_;
}

uint64_t Inner::numCaptured() const {
  std::lock_guard<std::mutex> lock(mu_);
  return num_captured_;
}

void Inner::watch(const WorkPtr& work) {
  std::lock_guard<std::mutex> lock(mu_);
  flight_.push_back({work, nullptr, true});
}

void Inner::follow(const WorkPtr& work, c10::Device device) {
  auto done = std::make_shared<c10::Event>(device.type());
  done->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  WorkPtr followed;  // let go without the lock
  std::lock_guard<std::mutex> lock(mu_);
  // Most are waited for at once.
  const auto flight =
      std::find_if(flight_.rbegin(), flight_.rend(),
                   [&](const Flight& each) { return each.work == work; });
  if (flight == flight_.rend()) return;
  followed = std::exchange(flight->work, nullptr);
  flight->done = std::move(done);
}

void Inner::wait() {
  std::deque<Flight> awaited;
  {
    std::lock_guard<std::mutex> lock(mu_);
    awaited = flight_;
  }
  for (const Flight& each : awaited) {
    if (each.is_message) continue;
    each.work ? (void)each.work->wait() : each.done->synchronize();
  }
}

void Inner::fail() {
  std::lock_guard<std::mutex> lock(mu_);
  has_failed_ = true;
}

std::exception_ptr Inner::failure() {
  std::vector<WorkPtr> ended;
  std::lock_guard<std::mutex> lock(mu_);
  ended = prune();
  return is_aborted_ ? nullptr : error_;
}

void Inner::count(int change) {
  std::lock_guard<std::mutex> lock(mu_);
  num_uses_ += change;
}

std::vector<Inner::WorkPtr> Inner::prune() {
  std::vector<WorkPtr> ended;
  // An abort may hold what is asked here for as long as it takes.
  // Nor may an event be asked while a graph is captured: that ends the capture.
  if (!backend_ || is_aborted_ || error_ || is_capturing) return ended;
  try {
    // Of works it has only copies, so that they tell of no timeout.
    if (tellsErrors(*backend_) &&
        backend_->getError() != c10d::ErrorType::SUCCESS) {
      throw std::runtime_error(
          "its backend has noticed an error, or an operation that took longer "
          "than the group's timeout");
    }
    while (!flight_.empty() && !error_) {
      const Flight& first = flight_.front();
      if (!(first.work ? first.work->isCompleted() : first.done->query()))
        break;
      if (first.work) error_ = first.work->exception();
      ended.push_back(first.work);
      flight_.pop_front();
    }
  } catch (...) {
    error_ = std::current_exception();
  }
  return ended;
}

Inner::Standing Inner::standing() {
  std::vector<WorkPtr> ended;
  std::lock_guard<std::mutex> lock(mu_);
  if (!backend_) {
    Standing none;
    none.is_quiet = num_uses_ == 0 && !is_aborted_;
    return none;
  }
  ended = prune();
  Standing now = standing_;
  now.is_quiet = flight_.empty() && num_uses_ == 0 && !has_failed_ && !error_ &&
                 !is_aborted_;
  return now;
}

void Inner::abort() {
  BackendPtr backend;
  {
    std::lock_guard<std::mutex> lock(mu_);
    is_aborted_ = true;
    backend = backend_;
  }
  if (backend) backend->abort();
}

void Inner::abortIfBusy() {
  if (!standing().is_quiet) abort();
}

void Inner::drop() {
  std::lock_guard<std::mutex> making(making_mu_);
  BackendPtr backend;
  std::deque<Flight> flight;
  std::lock_guard<std::mutex> lock(mu_);
  std::swap(backend, backend_);
  std::swap(flight, flight_);
  standing_ = {};
  have_met_ = is_aborted_ = has_failed_ = false;
  error_ = nullptr;
}

}  // namespace mnemosyne::ccl
