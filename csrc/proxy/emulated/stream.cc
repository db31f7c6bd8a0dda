#include "proxy/emulated/stream.h"

#include <thread>
#include <utility>

namespace mnemosyne::proxy::emulated {

bool Point::isReached() const {
  return stream == nullptr || stream->isReached(number);
}

void Point::wait() const {
  if (stream != nullptr) stream->wait(number);
}

Point Stream::enqueue(Operation operation) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(operation));
  ++num_enqueued_;
  if (!is_started_) {
    is_started_ = true;
    // Detached: it may be in a kernel that never ends, and then ends with the
    // process.
    std::thread([self = shared_from_this()] { self->run(); }).detach();
  }
  work_.notify_one();
  return {shared_from_this(), num_enqueued_};
}

Point Stream::last() {
  std::lock_guard<std::mutex> lock(mutex_);
  return {shared_from_this(), num_enqueued_};
}

bool Stream::isReached(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_done_ >= number;
}

void Stream::wait(uint64_t number) {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return num_done_ >= number || device_error_ != 0; });
}

void Stream::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_closed_ = true;
  work_.notify_one();
}

void Stream::wakeWaiters() {
  std::lock_guard<std::mutex> lock(mutex_);
  done_.notify_all();
}

void Stream::run() {
  for (;;) {
    Operation operation;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      work_.wait(lock, [&] { return !queue_.empty() || is_closed_; });
      if (queue_.empty()) return;
      operation = std::move(queue_.front());
      queue_.pop_front();
    }
    for (const Point& point : operation.after) point.wait();
    execute_(operation);
    operation = {};  // what it holds goes before others see it done
    std::lock_guard<std::mutex> lock(mutex_);
    ++num_done_;
    done_.notify_all();
  }
}

}  // namespace mnemosyne::proxy::emulated
