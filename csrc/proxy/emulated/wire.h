// How the ranks of a communicator reach each other: a ring of bytes for each
// ordered pair, in one segment of memory that all of them map, and a bell for
// each rank that others ring when they have done something for it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "common/shm.h"

namespace mnemosyne::proxy::emulated {

// Bytes for a peer or from it. Those between the same two ranks go in order.
struct Transfer {
  int peer;
  std::byte* data;  // not written to when it is sent
  size_t size_bytes;
  size_t done_bytes = 0;
};

using Segment = std::shared_ptr<SharedMemory>;  // null with a single rank

class Wire {
 public:
  // There are several wires in a segment, with numbers from 0: what goes over
  // one never mixes with another, nor waits for it.
  static constexpr int kNumWires = 2;
  static size_t segmentBytes(int num_ranks);

  Wire(Segment segment, int number, int num_ranks, int rank);

  // Runs all transfers at once, as far as the peers do theirs; sleeps when none
  // can go on. Returns false if `stop` said so, which it is asked whenever
  // someone wakes this rank. One thread at a time.
  bool exchange(std::vector<Transfer> sends, std::vector<Transfer> receives,
                const std::function<bool()>& stop);

  // Has exchange() ask `stop`; any thread.
  void wake();

 private:
  using Bell = std::atomic<uint32_t>;
  struct Ring;

  Ring& ring(int from, int to) const;
  Bell& bell(int rank) const;
  void ringBell(int rank) const;
  bool send(Transfer& transfer) const;
  bool receive(Transfer& transfer) const;

  const Segment segment_;
  const int number_;
  const int num_ranks_;
  const int rank_;
};

}  // namespace mnemosyne::proxy::emulated
