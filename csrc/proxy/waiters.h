// Threads that do what may take long, each one thing at a time. There are as
// many as things that were ever in progress together.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace mnemosyne::proxy {

class Waiters {
 public:
  // `prepare` runs once in each thread.
  explicit Waiters(std::function<void()> prepare)
      : prepare_(std::move(prepare)) {}
  ~Waiters() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    work_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    if (queue_.size() > num_idle_) threads_.emplace_back([this] { serve(); });
    work_.notify_one();
  }

 private:
  void serve() {
    prepare_();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      ++num_idle_;
      work_.wait(lock, [this] { return ends_ || !queue_.empty(); });
      --num_idle_;
      if (queue_.empty()) return;
      auto work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }

  const std::function<void()> prepare_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::function<void()>> queue_;
  size_t num_idle_ = 0;
  bool ends_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace mnemosyne::proxy
