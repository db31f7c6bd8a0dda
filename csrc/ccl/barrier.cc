#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {

// Dissemination: in round n every rank tells the one 2^n further that it is
// there, with all that it has heard of.
Task barrier(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  Transfer in;
  Transfer out;
  for (int distance = 1; distance < size; distance <<= 1) {
    in.recv(op, (rank + size - distance) % size, distance, nullptr, 0);
    out.send(op, (rank + distance) % size, distance, nullptr, 0);
    co_await out;
    co_await in;
  }
}

// All report to rank 0, which therefore can name those that did not.
Task monitoredBarrier(Operation& op) {
  Transfer in;
  Transfer out;
  if (op.rank() != 0) {
    out.send(op, 0, 0, nullptr, 0);
    co_await out;
    in.recv(op, 0, 1, nullptr, 0);
    co_await in;
    co_return;
  }
  std::vector<Transfer> all(op.size());
  for (int rank = 1; rank < op.size(); ++rank)
    all[rank].recv(op, rank, 0, nullptr, 0);
  for (Transfer& each : all) co_await each;
  for (int rank = 1; rank < op.size(); ++rank)
    all[rank].send(op, rank, 1, nullptr, 0);
  for (Transfer& each : all) co_await each;
}

}  // namespace mnemosyne::ccl
