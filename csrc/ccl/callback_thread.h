// Runs what users hang on futures. Never on the progress thread: a callback may
// take the interpreter's lock, or start a collective and wait for it, or for a
// future that another callback settles: so there are as many threads as there
// are callbacks that have begun.
#pragma once

#include <functional>
#include <memory>

namespace mnemosyne::ccl {

class CallbackThreads {
 public:
  CallbackThreads();
  // Runs what is queued, and ends. Called from a callback, it does not wait for
  // that.
  ~CallbackThreads();

  void run(std::function<void()> callback);

 private:
  struct Queue;

  void addThread();  // Requires: the queue's mutex held.

  std::shared_ptr<Queue> queue_;  // the threads' too
};

// Names the calling thread, and leaves all signals to the others: handlers
// belong to the user's threads.
void nameThread(const char* name);

}  // namespace mnemosyne::ccl
