// One collective or point-to-point operation, from submission to its end.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "ccl/group.h"
#include "ccl/reduce_ops.h"
#include "ccl/task.h"
#include "ccl/transfer.h"
#include "common/deadline.h"

namespace mnemosyne::ccl {

class CallbackThreads;
class Mesh;

enum class Kind : uint8_t {
  kAllReduce,
  kReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kGather,
  kScatter,
  kAllToAll,
  kBarrier,
  kMonitoredBarrier,
  kSend,
  kRecv,
  kRecvAny,
  kAllGatherUnequal,
};

const char* name(Kind kind);
// "1, 2, 5"
std::string joined(const std::vector<int>& ranks);

struct Buffer {
  std::byte* data = nullptr;
  size_t size = 0;
};

// Something for the progress thread to do.
class Submission {
 public:
  virtual ~Submission() = default;

 private:
  friend class Mesh;
  // Called once, on the progress thread. Those behind it rely on its return.
  virtual void run(Mesh& mesh) noexcept = 0;
  Submission* next_ = nullptr;
};

// What to do is set before Mesh::submit(); then all belongs to the progress
// thread until complete() is called. Buffers by kind:
//
//   all-reduce       outputs[0], in place
//   reduce           outputs[0]; only the root's is written to
//   reduce-scatter   inputs: one per rank, all of the size of outputs[0]
//   all-gather       inputs[0]; outputs: one per rank
//   broadcast        outputs[0]; the root's is sent
//   gather           inputs[0]; at the root also outputs: one per rank
//   scatter          outputs[0]; at the root also inputs: one per rank
//   all-to-all       inputs and outputs: one per rank
//   send, recv       inputs[0], outputs[0]
//   all-gather of unequal shares: inputs[0]; it makes the outputs itself, one
//                    per rank, in memory that the operation keeps
class Operation : public Submission {
 public:
  Kind kind = Kind::kBarrier;
  std::shared_ptr<Group> group;
  std::vector<Buffer> inputs;
  std::vector<Buffer> outputs;
  DataType type = DataType::kBytes;
  const char* type_name = "";  // for people; lives as long as the program
  ReduceOp reduce_op = ReduceOp::kSum;
  int root = 0;  // rank within the group; the peer of a send or receive
  uint64_t tag = 0;
  Milliseconds timeout{0};
  // What else all ranks must have in common, hashed; for a message, its two
  // ends. A rank that differs is told so.
  uint64_t agreed = 0;

  std::unique_ptr<std::byte[]> gathered;  // of unequal shares
  // Whom it waited for when its time was over; set before complete().
  std::vector<int> late_ranks;
  int source_rank = -1;  // of what was received; set before complete()

  // ---- for algorithms, on the progress thread
  int rank() const { return group->rank(); }
  int size() const { return group->size(); }
  uint64_t sequence() const { return sequence_; }
  size_t numBytes() const;
  uint16_t signature() const { return signature_; }

 protected:
  // Called once, when no buffer will be touched any more. The operation may be
  // destroyed by it.
  virtual void complete(std::exception_ptr error,
                        CallbackThreads& callbacks) noexcept = 0;
  // Called before a successful complete(), to copy from staging buffers.
  virtual void unstage() {}

 private:
  friend class Mesh;
  friend class Transfer;
  friend class Turn;

  void run(Mesh& mesh) noexcept override;
  void addPending(Transfer* transfer);
  void removePending(Transfer* transfer);
  // The ranks whose messages, or whose readiness, it waits for.
  std::vector<int> awaitedRanks() const;
  bool awaits(const Peer& peer) const;

  Mesh* mesh_ = nullptr;
  Task task_;
  uint64_t sequence_ = 0;
  uint16_t signature_ = 0;
  Deadline deadline_ = Deadline::never();
  const void* awaited_ = nullptr;  // what the coroutine waits for
  bool is_ready_ = false;          // in the mesh's list of coroutines to resume
  Transfer* pending_ = nullptr;
  size_t record_ = SIZE_MAX;  // its place in the set-up log
  // Neighbours in the mesh's list of operations in flight.
  Operation* flight_next_ = nullptr;
  Operation* flight_previous_ = nullptr;
};

}  // namespace mnemosyne::ccl
