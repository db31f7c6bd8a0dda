#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {
namespace {

void placeOwn(Operation& op) {
  const Buffer input = op.inputs[0];
  std::byte* own = op.outputs[op.rank()].data;
  // It is there already if the input is a part of the output.
  if (input.size > 0 && own != input.data)
    std::memmove(own, input.data, input.size);
}

Task directAllGather(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  placeOwn(op);
  const Buffer own = op.outputs[rank];
  std::vector<Transfer> sends(size);
  std::vector<Transfer> recvs(size);
  for (int distance = 1; distance < size; ++distance) {
    const int to = (rank + distance) % size;
    const int from = (rank + size - distance) % size;
    recvs[from].recv(op, from, 0, op.outputs[from].data, op.outputs[from].size);
    sends[to].send(op, to, 0, own.data, own.size);
  }
  for (Transfer& recv : recvs) co_await recv;
  for (Transfer& send : sends) co_await send;
}

Task ringAllGather(Operation& op, size_t largest) {
  const int rank = op.rank();
  const int size = op.size();
  const Ring ring(op, largest, size - 1);
  std::array<Transfer, kPipeline> sends;
  std::array<Transfer, kPipeline> recvs;
  placeOwn(op);

  const auto piece = [&](size_t k, int back) {
    return ring.cut(op.outputs[(rank + 2 * size - ring.step(k) - back) % size],
                    k);
  };
  const auto post = [&](size_t k) {
    const Buffer chunk = piece(k, 1);
    recvs[k % kPipeline].recv(op, ring.left, k, chunk.data, chunk.size);
  };

  for (size_t k = 0; k < std::min(kPipeline, ring.total); ++k) post(k);
  size_t next = 0;
  for (size_t k = 0; k < ring.total; ++k) {
    while (next < ring.horizon(k)) {
      Transfer& send = sends[next % kPipeline];
      co_await send;
      const Buffer chunk = piece(next, 0);
      send.send(op, ring.right, next, chunk.data, chunk.size);
      ++next;
    }
    co_await recvs[k % kPipeline];
    if (k + kPipeline < ring.total) post(k + kPipeline);
  }
  for (Transfer& send : sends) co_await send;
}

}  // namespace

Task allGather(Operation& op) {
  size_t largest = 0;
  for (const Buffer& output : op.outputs)
    largest = std::max(largest, output.size);
  return largest <= kEagerBytes ? directAllGather(op)
                                : ringAllGather(op, largest);
}

}  // namespace mnemosyne::ccl
