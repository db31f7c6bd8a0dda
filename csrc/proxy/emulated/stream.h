// A stream: operations that a thread of its own runs one after the other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace mnemosyne::proxy::emulated {

class Stream;

// A place in a stream: reached when the operation with that number is done, and
// all before it. The empty one is always reached.
struct Point {
  std::shared_ptr<Stream> stream;
  uint64_t number = 0;

  bool isReached() const;
  // Waits until it is reached, or until the device is broken.
  void wait() const;
};

// A piece of work. Bodies return a CudaError, which breaks the device.
struct Operation {
  std::function<int()> body;
  bool is_counted = false;  // by Options::at
  std::vector<Point> after;
  uint64_t count = 0;  // filled in by the device
};

// Any thread may call any method; operations run on the stream's thread, which
// starts with the first one. A stream that is closed runs what it has; its
// thread keeps it alive until then.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  // `execute` runs an operation, unless the device is broken.
  // `is_blocking`: ordered with the legacy default stream.
  Stream(bool is_blocking, const std::atomic<int>& device_error,
         std::function<void(Operation&)> execute)
      : is_blocking_(is_blocking),
        device_error_(device_error),
        execute_(std::move(execute)) {}

  Point enqueue(Operation operation);
  Point last();
  bool isReached(uint64_t number);
  void wait(uint64_t number);
  void close();
  void wakeWaiters();  // behind a change of the device's error
  bool isBlocking() const { return is_blocking_; }

 private:
  void run();

  const bool is_blocking_;
  const std::atomic<int>& device_error_;
  const std::function<void(Operation&)> execute_;

  std::mutex mutex_;  // of all below; a leaf: nothing is called under it
  std::condition_variable work_;
  std::condition_variable done_;
  std::deque<Operation> queue_;
  uint64_t num_enqueued_ = 0;
  uint64_t num_done_ = 0;
  bool is_started_ = false;
  bool is_closed_ = false;
};

}  // namespace mnemosyne::proxy::emulated
