// An owned file descriptor that no child process inherits.
//
// O_CLOEXEC covers exec. A plain fork (a data loader's worker) would still copy
// it, and while a copy is open the peer of a socket sees no EOF when this
// process dies. So every Fd is closed in a forked child before fork() returns
// there.
#pragma once

#include <mutex>
#include <utility>

namespace mnemosyne {

class Fd {
 public:
  Fd() = default;
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), generation_(other.generation_) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
      generation_ = other.generation_;
    }
    return *this;
  }

  // Calls `create`, which returns a descriptor or -1, and owns what it returns.
  // No fork can happen in between. `create` must not block.
  template <typename Create>
  static Fd make(Create&& create) {
    std::lock_guard<std::mutex> lock(forkMutex());
    return Fd(create());
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  explicit Fd(int fd);  // Requires: forkMutex held.
  static std::mutex& forkMutex();

  int fd_ = -1;
  // How many forks led to the process that owns it: in a child the number may
  // be somebody else's descriptor by now.
  unsigned generation_ = 0;
};

// Number of forks between the first process with our code and this one. An
// object that remembers another number was inherited, and its threads do not
// exist here.
unsigned forkGeneration();

}  // namespace mnemosyne
