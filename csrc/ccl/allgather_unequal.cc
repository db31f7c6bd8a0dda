#include <cstring>
#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {

// Each rank tells its size, then sends its share. Straight to every other: who
// has nothing to send costs nothing.
Task allGatherUnequal(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  const Buffer own = op.inputs[0];
  std::vector<uint64_t> sizes(size, own.size);
  std::vector<Transfer> sends(size);
  std::vector<Transfer> recvs(size);
  for (int distance = 1; distance < size; ++distance) {
    const int to = (rank + distance) % size;
    const int from = (rank + size - distance) % size;
    recvs[from].recv(op, from, 0, &sizes[from], sizeof(uint64_t));
    sends[to].send(op, to, 0, &sizes[rank], sizeof(uint64_t));
  }
  for (Transfer& recv : recvs) co_await recv;
  for (Transfer& send : sends) co_await send;

  uint64_t total = 0;
  for (const uint64_t each : sizes) total += each;
  op.gathered = makeScratch(total);
  std::byte* next = op.gathered.get();
  for (const uint64_t each : sizes) {
    op.outputs.push_back({next, each});
    next += each;
  }
  if (own.size > 0) std::memcpy(op.outputs[rank].data, own.data, own.size);
  for (int distance = 1; distance < size; ++distance) {
    const int to = (rank + distance) % size;
    const int from = (rank + size - distance) % size;
    recvs[from].recv(op, from, 1, op.outputs[from].data, op.outputs[from].size);
    sends[to].send(op, to, 1, own.data, own.size);
  }
  for (Transfer& recv : recvs) co_await recv;
  for (Transfer& send : sends) co_await send;
}

}  // namespace mnemosyne::ccl
