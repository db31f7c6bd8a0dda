// Many workers as processes without torch: each is forked, holds one mesh, and
// does what the test's process tells it over a socketpair.
//
// The test's process must not have threads of its own, so it makes no mesh.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "ccl/mesh.h"
#include "common/fd.h"

namespace mnemosyne::testing {

enum class Verb : uint32_t {
  kSeat,       // members follow; value: links replaced
  kAllReduce,  // `count` elements on each of `groups` groups
  kConnect,    // opens a link to every other rank
  kBarrier,    // on the first group
  kReceive,    // `count` elements from rank `peer`, and checks them
  kSend,       // `count` elements to rank `peer`
  kFence,      // latches a failure from outside
  kMeasure,    // what the worker holds, see Usage
  kEnd,
};

struct Request {
  Verb verb = Verb::kEnd;
  int rank = -1;
  int64_t epoch = -1;
  int peer = -1;
  int groups = 1;
  uint64_t count = 1;
  int timeout_ms = 20'000;
  uint32_t num_members = 0;
};

struct Usage {
  int64_t rss_bytes;     // private memory in use
  int64_t heap_bytes;    // what was allocated and not freed
  int64_t shared_bytes;  // of shared memory, what this worker has touched
  int64_t mapped_bytes;
  int64_t fds;
  int64_t threads;
  int64_t links_open;
  int64_t links_opened;
  int64_t bytes_sent;
  int64_t bytes_received;
};

enum class Outcome : uint32_t {
  kDone,
  kPeerLost,
  kStale,
  kTimeout,
  kWrongResult,  // what must never be
  kFailed,
};

struct Answer {
  Outcome outcome = Outcome::kFailed;
  int rank = -1;  // that the error names
  int64_t value = 0;
  int64_t took_ns = 0;
  Usage usage{};
  char text[240] = {};
};

// One worker process. Destroyed: killed, if it has not ended.
class ForkedWorker {
 public:
  ForkedWorker(uint64_t id, bool use_shm);
  ~ForkedWorker();
  ForkedWorker(ForkedWorker&&) noexcept;
  ForkedWorker& operator=(ForkedWorker&&) noexcept;

  uint64_t id() const { return member_.worker_id; }
  const ccl::Mesh::Member& member() const { return member_; }
  pid_t pid() const { return pid_; }

  void tell(const Request& request,
            const std::vector<ccl::Mesh::Member>& members = {});
  // Throws if the worker does not answer within a minute, or is dead.
  Answer answer();
  // Whether an answer, or its end, is there.
  bool hasAnswered(int timeout_ms);
  // Stopped: returns once it is.
  void stop();
  void resume();
  void kill();
  // Asks it to end and returns its exit status.
  int end();

 private:
  pid_t pid_ = -1;
  Fd pipe_;
  ccl::Mesh::Member member_;
};

// One worker for each rank.
class ForkedWorld {
 public:
  ForkedWorld(int size, bool use_shm);

  int size() const { return static_cast<int>(workers.size()); }
  // Puts a new worker on the rank, after the end of the former one. seat()
  // tells the others.
  void replace(int rank);
  // Moves all to a new epoch. Throws unless all of them get there.
  std::vector<Answer> seat();
  void tellSeat(int rank);

  void tellAll(Request request);
  std::vector<Answer> answers();
  // As both, and throws what went wrong.
  std::vector<Answer> all(Request request);
  // All end by themselves, and well: sanitizers report at the exit.
  void end();

  std::vector<ForkedWorker> workers;  // workers[r] holds rank r
  int64_t epoch = 0;

 private:
  const bool use_shm_;
  uint64_t next_id_ = 1;
};

int64_t nowNs();

// Lets this process, and those that it forks, open as many files as it may.
void raiseFdLimit();

}  // namespace mnemosyne::testing
