#include "ccl/callback_thread.h"

#include <pthread.h>

namespace mnemosyne::ccl {

CallbackThread::~CallbackThread() {
  {
    std::lock_guard<std::mutex> lock(mu_);
    stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void CallbackThread::run(std::function<void()> callback) {
  {
    std::lock_guard<std::mutex> lock(mu_);
    queue_.push_back(std::move(callback));
  }
  changed_.notify_one();
}

void CallbackThread::loop() {
  ::pthread_setname_np(::pthread_self(), "mnemo-callbacks");
  std::unique_lock<std::mutex> lock(mu_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;  // all that was queued has run
    {
      const auto callback = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      callback();
    }
    lock.lock();
  }
}

}  // namespace mnemosyne::ccl
