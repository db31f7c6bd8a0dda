// A coroutine that the progress thread runs, so that an algorithm reads from
// top to bottom. It starts suspended; destroying it at any `co_await` ends it
// and whatever it owns, which is how operations are aborted.
#pragma once

#include <array>
#include <coroutine>
#include <cstddef>
#include <exception>
#include <utility>
#include <vector>

namespace mnemosyne::ccl {

// Keeps the memory of ended coroutines for the next ones. One per thread; only
// the progress thread makes coroutines.
class FramePool {
 public:
  static void* allocate(size_t size);
  static void release(void* frame, size_t size);

 private:
  static constexpr size_t kStep = 256;
  static constexpr size_t kSizes = 16;
  std::array<std::vector<void*>, kSizes> free_;

  static FramePool& local();
  FramePool() = default;
  ~FramePool();
};

class Task {
 public:
  struct promise_type {
    std::exception_ptr error;

    Task get_return_object() {
      return Task(std::coroutine_handle<promise_type>::from_promise(*this));
    }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { error = std::current_exception(); }
    void* operator new(size_t size) { return FramePool::allocate(size); }
    void operator delete(void* frame, size_t size) {
      FramePool::release(frame, size);
    }
  };

  Task() = default;
  Task(Task&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    if (this != &other) {
      reset();
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }
  ~Task() { reset(); }

  void reset() {
    if (auto handle = std::exchange(handle_, nullptr)) handle.destroy();
  }
  // Requires: not done().
  void resume() { handle_.resume(); }
  bool done() const { return handle_.done(); }
  std::exception_ptr error() const { return handle_.promise().error; }

 private:
  explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
  std::coroutine_handle<promise_type> handle_;
};

}  // namespace mnemosyne::ccl
