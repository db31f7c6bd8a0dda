// A communicator of NCCL: the ranks, how they reach each other, and what they
// run together.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "proxy/emulated/device.h"
#include "proxy/emulated/reduce.h"
#include "proxy/emulated/rendezvous.h"
#include "proxy/emulated/wire.h"

namespace mnemosyne::proxy::emulated {

enum class Verb {
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kSend,
  kReceive,
};

// A sum of what was multiplied with a factor before: ncclRedOpCreatePreMulSum.
struct Factor {
  int type;
  const void* on_device;  // null: it is this number
  std::byte number[8];
};

// One call of NCCL. `count` is of elements as in the call's signature; `peer`
// is the root, or the other side.
struct Call {
  Verb verb;
  const void* from;
  void* to;
  size_t count;
  int type;
  int op = kSum;
  int peer = 0;
  std::optional<Factor> factor = {};  // instead of op; see submit()
};

// Any thread may call any method. What runs in a stream holds it.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  Communicator(int num_ranks, int rank) : num_ranks_(num_ranks), rank_(rank) {}

  int rank() const { return rank_; }
  int numRanks() const { return num_ranks_; }

  // Meets the other ranks. Not before the end of that, which error() tells, may
  // it be used.
  void open(const NcclUniqueId& id);
  int error() const;  // a NcclResult; kNcclInProgress until it is open

  // Ends whatever waits for a peer, at once.
  void abort();
  void wake();  // has those who wait look whether it is over
  // Waits for all that was submitted.
  void finalize();

  // What is wrong with a call; a NcclResult.
  int check(const Call& call) const;
  // Puts calls into a stream, as one operation: those from rank to rank side by
  // side, then the others in their order. It waits for `after` too.
  int submit(void* stream, std::vector<Call> calls, std::vector<Point> after,
             Point* end);

  // Finds those of the same color and agrees with them on an id. Returns a
  // NcclResult.
  struct Part {
    int num_ranks = 0;  // 0 with a negative color
    int rank = 0;
    NcclUniqueId id = {};
  };
  int split(int color, int key, Part* part);

  int addFactor(const Factor& factor);  // returns the number of its operation
  bool dropFactor(int op);

 private:
  // In collectives.cc. They return false if the communicator is over.
  int run(const std::vector<Call>& calls);
  bool isReachable(const Call& call) const;
  bool runTransfers(const std::vector<Call>& calls);
  bool runCollective(const Call& call);
  bool broadcast(const Call& call);
  bool allGather(const Call& call);
  bool allToAll(const Call& call);
  bool reduceAll(Call call);
  bool exchange(std::vector<Transfer> sends, std::vector<Transfer> receives);

  bool isOver() const;

  const int num_ranks_;
  const int rank_;
  Visit visit_;
  std::atomic<bool> is_aborted_ = false;
  std::atomic<int> open_error_ = kNcclInProgress;

  // Set by open(): the first for streams, the second for calls of the host.
  std::unique_ptr<Wire> stream_wire_;
  std::unique_ptr<Wire> host_wire_;

  std::mutex host_mutex_;     // one call of the host at a time
  mutable std::mutex mutex_;  // of all below; locked before the device's
  Point last_;
  int next_op_ = 5;  // ncclNumOps
  std::map<int, Factor> factors_;
};

// The communicator of a handle, or null.
std::shared_ptr<Communicator> communicator(void* handle);

}  // namespace mnemosyne::proxy::emulated
