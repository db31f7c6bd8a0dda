#include "ccl/callback_thread.h"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace mnemosyne::ccl {
namespace {

// More than anybody nests waits for one operation in callbacks of another.
constexpr size_t kMaxThreads = 64;

thread_local bool is_one_of_them = false;

}  // namespace

struct CallbackThreads::Queue {
  std::mutex mu;
  std::condition_variable changed;
  std::deque<std::function<void()>> callbacks;  // guarded by mu
  size_t num_threads = 0;                       // guarded by mu
  size_t num_idle = 0;                          // guarded by mu
  bool stopping = false;                        // guarded by mu

  void runAll();
};

CallbackThreads::CallbackThreads() : queue_(std::make_shared<Queue>()) {
  std::lock_guard<std::mutex> lock(queue_->mu);
  addThread();  // one stays, for the next callback
}

CallbackThreads::~CallbackThreads() {
  std::unique_lock<std::mutex> lock(queue_->mu);
  queue_->stopping = true;
  queue_->changed.notify_all();
  const size_t ours = is_one_of_them ? 1 : 0;
  queue_->changed.wait(lock, [&] { return queue_->num_threads <= ours; });
}

void CallbackThreads::run(std::function<void()> callback) {
  std::lock_guard<std::mutex> lock(queue_->mu);
  queue_->callbacks.push_back(std::move(callback));
  if (queue_->num_idle >= queue_->callbacks.size() ||
      queue_->num_threads >= kMaxThreads) {
    queue_->changed.notify_one();
    return;
  }
  // All are busy, and may be so until this very callback has run.
  try {
    addThread();
  } catch (const std::system_error&) {
    // No room for it: one of those that are there will come to the callback.
    queue_->changed.notify_one();
  }
}

void CallbackThreads::addThread() {
  std::thread([queue = queue_] { queue->runAll(); }).detach();
  ++queue_->num_threads;
}

void CallbackThreads::Queue::runAll() {
  nameThread("mnemo-callbacks");
  is_one_of_them = true;
  std::unique_lock<std::mutex> lock(mu);
  while (true) {
    ++num_idle;
    changed.wait(lock, [this] { return stopping || !callbacks.empty(); });
    --num_idle;
    if (callbacks.empty()) break;
    {
      const auto callback = std::move(callbacks.front());
      callbacks.pop_front();
      lock.unlock();
      callback();
    }
    lock.lock();
    if (callbacks.empty() && num_idle > 0) break;
  }
  --num_threads;
  changed.notify_all();
}

void nameThread(const char* name) {
  ::pthread_setname_np(::pthread_self(), name);
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

}  // namespace mnemosyne::ccl
