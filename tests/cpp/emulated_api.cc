#include "emulated_api.h"

#include <poll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <stdexcept>

#include "common/deadline.h"

namespace mnemosyne::testing {
namespace {

pid_t start(const std::function<void()>& body) {
  std::cout.flush();
  const pid_t pid = fork();
  if (pid != 0) return pid;
  try {
    body();
  } catch (const std::exception& error) {
    std::cerr << "      " << error.what() << std::endl;
    _exit(1);
  }
  _exit(0);
}

// The status that the child ended with; kills one that is late.
int finish(pid_t pid, const Deadline& deadline) {
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  pollfd end = {fd, POLLIN, 0};
  if (poll(&end, 1, deadline.remainingMs()) == 0) kill(pid, SIGKILL);
  close(fd);
  int status = 0;
  waitpid(pid, &status, 0);
  return status;
}

constexpr Milliseconds kPatience{60'000};

}  // namespace

void withDevice(const std::string& options, const std::function<void()>& body,
                int death, const std::string& generation) {
  const pid_t pid = start([&] {
    setenv("MNEMOSYNE_EMULATED", options.c_str(), 1);
    if (!generation.empty()) {
      setenv("MNEMOSYNE_PROXY_GENERATION", generation.c_str(), 1);
    }
    body();
  });
  const int status = finish(pid, Deadline::in(kPatience));
  const bool as_wanted = death == 0
                             ? status == 0
                             : WIFSIGNALED(status) && WTERMSIG(status) == death;
  if (!as_wanted) {
    throw std::runtime_error("the child ended with " + std::to_string(status));
  }
}

void withRanks(int num_ranks, const std::function<void(int rank)>& body) {
  std::vector<pid_t> pids;
  for (int rank = 0; rank < num_ranks; ++rank) {
    pids.push_back(start([&] { body(rank); }));
  }
  const Deadline deadline = Deadline::in(kPatience);
  std::string wrong;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int status = finish(pids[rank], deadline);
    if (status != 0) {
      wrong += " rank " + std::to_string(rank) + " ended with " +
               std::to_string(status);
    }
  }
  if (!wrong.empty()) throw std::runtime_error(wrong);
}

void check(int error, const char* what, int line) {
  if (error == 0) return;
  throw std::runtime_error("line " + std::to_string(line) + ": " + what +
                           " returned " + std::to_string(error));
}

void openContext() {
  void* context = nullptr;
  CHECK(cuInit(0));
  CHECK(cuDevicePrimaryCtxRetain(&context, 0));
  CHECK(cuCtxSetCurrent(context));
}

Allocation::Allocation(size_t size_bytes) {
  constexpr size_t kGranularity = size_t{2} << 20;
  size_bytes_ = (size_bytes + kGranularity - 1) / kGranularity * kGranularity;
  const proxy::AllocationProperties properties = {1, 0, {1, 0}, nullptr, {}};
  const proxy::AccessDescriptor access = {{1, 0}, 3};
  CHECK(cuMemCreate(&handle_, size_bytes_, &properties, 0));
  CHECK(cuMemAddressReserve(&address_, size_bytes_, 0, 0, 0));
  CHECK(cuMemMap(address_, size_bytes_, 0, handle_, 0));
  CHECK(cuMemSetAccess(address_, size_bytes_, &access, 1));
}

Allocation::~Allocation() {
  cuCtxSynchronize();
  cuMemUnmap(address_, size_bytes_);
  cuMemRelease(handle_);
  cuMemAddressFree(address_, size_bytes_);
}

Gate::Gate(void* stream) {
  if (pipe(fds_) != 0) throw std::runtime_error("no pipe");
  const auto wait = [](void* fd) {
    char byte;
    while (read(static_cast<int>(reinterpret_cast<intptr_t>(fd)), &byte, 1) <
           0) {
    }
  };
  CHECK(cuLaunchHostFunc(
      stream, wait, reinterpret_cast<void*>(static_cast<intptr_t>(fds_[0]))));
}

void Gate::open() {
  if (write(fds_[1], "x", 1) != 1) throw std::runtime_error("no gate");
}

}  // namespace mnemosyne::testing
