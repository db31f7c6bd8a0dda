#include "ccl/callback_thread.h"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

namespace mnemosyne::ccl {

struct CallbackThread::Queue {
  std::mutex mu;
  std::condition_variable changed;
  std::deque<std::function<void()>> callbacks;  // guarded by mu
  bool stopping = false;                        // guarded by mu

  void runAll();
};

CallbackThread::CallbackThread()
    : queue_(std::make_shared<Queue>()),
      thread_([queue = queue_] { queue->runAll(); }) {}

CallbackThread::~CallbackThread() {
  {
    std::lock_guard<std::mutex> lock(queue_->mu);
    queue_->stopping = true;
  }
  queue_->changed.notify_one();
  if (thread_.get_id() == std::this_thread::get_id()) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

void CallbackThread::run(std::function<void()> callback) {
  {
    std::lock_guard<std::mutex> lock(queue_->mu);
    queue_->callbacks.push_back(std::move(callback));
  }
  queue_->changed.notify_one();
}

void CallbackThread::Queue::runAll() {
  nameThread("mnemo-callbacks");
  std::unique_lock<std::mutex> lock(mu);
  while (true) {
    changed.wait(lock, [this] { return stopping || !callbacks.empty(); });
    if (callbacks.empty()) return;
    {
      const auto callback = std::move(callbacks.front());
      callbacks.pop_front();
      lock.unlock();
      callback();
    }
    lock.lock();
  }
}

void nameThread(const char* name) {
  ::pthread_setname_np(::pthread_self(), name);
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

}  // namespace mnemosyne::ccl
