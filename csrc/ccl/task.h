// A coroutine that the engine runs, so that an algorithm reads from
// top to bottom. It starts suspended; destroying it at any `co_await` ends it
// and whatever it owns, which is how operations are aborted.
#pragma once

#include <coroutine>
#include <exception>
#include <utility>

namespace mnemosyne::ccl {

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
