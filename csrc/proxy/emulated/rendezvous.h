// Where the ranks of a new communicator meet: an abstract Unix socket, whose
// name is the communicator's unique id and is gone with its process.
#pragma once

#include <memory>
#include <mutex>

#include "common/fd.h"
#include "proxy/cuda_abi.h"
#include "proxy/emulated/wire.h"

namespace mnemosyne::proxy::emulated {

// Opens a meeting: a thread of this process waits for the ranks and gives each
// the segment that it makes for them. Returns a NcclResult.
int openMeeting(NcclUniqueId* id);

// A rank's way to its meeting.
class Visit {
 public:
  // Waits until all ranks have come. Returns a NcclResult; the segment stays
  // null with a single rank, who meets nobody.
  int join(const NcclUniqueId& id, int num_ranks, int rank, Segment* segment);

  // Makes join() return, now or later; any thread.
  void cancel();

 private:
  std::mutex mutex_;  // of all below
  std::shared_ptr<Fd> socket_;
  bool is_cancelled_ = false;
};

}  // namespace mnemosyne::proxy::emulated
