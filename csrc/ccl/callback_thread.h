// Runs what users hang on futures. Never on the progress thread: a callback may
// take the interpreter's lock, or start a collective and wait for it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace mnemosyne::ccl {

class CallbackThread {
 public:
  CallbackThread() : thread_([this] { loop(); }) {}
  // Requires: not called from a callback.
  ~CallbackThread();

  void run(std::function<void()> callback);

 private:
  void loop();

  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;  // guarded by mu_
  bool stopping_ = false;                    // guarded by mu_
  std::thread thread_;
};

}  // namespace mnemosyne::ccl
