// What needs no relay: each message goes from its source to its destination.
// Those that are long wait for their receiver's grant, so posting all of them
// at once costs no memory.
#include <cstring>
#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {
namespace {

void copy(const Buffer& to, const Buffer& from) {
  if (from.size > 0 && to.data != from.data)
    std::memmove(to.data, from.data, from.size);
}

}  // namespace

Task allToAll(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  std::vector<Transfer> sends(size);
  std::vector<Transfer> recvs(size);
  copy(op.outputs[rank], op.inputs[rank]);
  for (int distance = 1; distance < size; ++distance) {
    const int to = (rank + distance) % size;
    const int from = (rank + size - distance) % size;
    recvs[from].recv(op, from, 0, op.outputs[from].data, op.outputs[from].size);
    sends[to].send(op, to, 0, op.inputs[to].data, op.inputs[to].size);
  }
  for (Transfer& recv : recvs) co_await recv;
  for (Transfer& send : sends) co_await send;
}

Task gather(Operation& op) {
  if (op.rank() != op.root) {
    Transfer send;
    send.send(op, op.root, 0, op.inputs[0].data, op.inputs[0].size);
    co_await send;
    co_return;
  }
  std::vector<Transfer> recvs(op.size());
  copy(op.outputs[op.root], op.inputs[0]);
  for (int from = 0; from < op.size(); ++from)
    if (from != op.root)
      recvs[from].recv(op, from, 0, op.outputs[from].data,
                       op.outputs[from].size);
  for (Transfer& recv : recvs) co_await recv;
}

Task scatter(Operation& op) {
  if (op.rank() != op.root) {
    Transfer recv;
    recv.recv(op, op.root, 0, op.outputs[0].data, op.outputs[0].size);
    co_await recv;
    co_return;
  }
  std::vector<Transfer> sends(op.size());
  copy(op.outputs[0], op.inputs[op.root]);
  for (int to = 0; to < op.size(); ++to)
    if (to != op.root)
      sends[to].send(op, to, 0, op.inputs[to].data, op.inputs[to].size);
  for (Transfer& send : sends) co_await send;
}

}  // namespace mnemosyne::ccl
