// Runs what users hang on futures. Never on the progress thread: a callback may
// take the interpreter's lock, or start a collective and wait for it.
#pragma once

#include <functional>
#include <memory>
#include <thread>

namespace mnemosyne::ccl {

class CallbackThread {
 public:
  CallbackThread();
  // Runs what is queued, and ends. Called from a callback, it does not wait for
  // that.
  ~CallbackThread();

  void run(std::function<void()> callback);

 private:
  struct Queue;

  std::shared_ptr<Queue> queue_;  // the thread's too
  std::thread thread_;
};

// Names the calling thread, and leaves all signals to the others: handlers
// belong to the user's threads.
void nameThread(const char* name);

}  // namespace mnemosyne::ccl
