#include <algorithm>
#include <array>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {
namespace {

// Recursive doubling: every rank exchanges everything log2(size) times. Ranks
// beyond the largest power of two give their values to a lower one and get the
// result.
Task doublingAllReduce(Operation& op) {
  const Buffer data = op.outputs[0];
  const int rank = op.rank();
  const int size = op.size();
  int power = 1;
  while (power * 2 <= size) power *= 2;
  const Scratch scratch = makeScratch(data.size);
  Transfer in;
  Transfer out;

  if (rank >= power) {
    out.send(op, rank - power, 0, data.data, data.size);
    co_await out;
    in.recv(op, rank - power, size, data.data, data.size);
    co_await in;
    co_return;
  }
  if (rank + power < size) {
    in.recv(op, rank + power, 0, scratch.get(), data.size);
    co_await in;
    reduce(op.type, op.reduce_op, data.data, data.data, scratch.get(),
           data.size);
  }
  for (int bit = 1; bit < power; bit <<= 1) {
    const int partner = rank ^ bit;
    in.recv(op, partner, bit, scratch.get(), data.size);
    out.send(op, partner, bit, data.data, data.size);
    co_await out;
    co_await in;
    const bool is_lower = rank < partner;
    reduce(op.type, op.reduce_op, data.data,
           is_lower ? data.data : scratch.get(),
           is_lower ? scratch.get() : data.data, data.size);
  }
  if (op.reduce_op == ReduceOp::kAverage)
    divide(op.type, data.data, size, data.size);
  if (rank + power < size) {
    out.send(op, rank + power, size, data.data, data.size);
    co_await out;
  }
}

// The n-th of `count` parts of a buffer, cut on element boundaries.
Buffer segmentOf(const Buffer& data, size_t element, int n, int count) {
  const size_t elements = data.size / element;
  const size_t begin = elements * static_cast<size_t>(n) / count;
  const size_t end = elements * static_cast<size_t>(n + 1) / count;
  return {data.data + begin * element, (end - begin) * element};
}

// Ring: each block is cut into one segment per rank, which goes round once to
// be summed and once more to be handed out.
Task ringAllReduce(Operation& op) {
  const Buffer data = op.outputs[0];
  const int rank = op.rank();
  const int size = op.size();
  const size_t element = elementBytes(op.type);
  const size_t elements = data.size / element;
  const Ring ring(op, (elements + size - 1) / size * element, 2 * (size - 1));
  const size_t block_bytes = ring.chunks * kRingChunkBytes * size;
  const Scratch scratch = makeScratch(kPipeline * kRingChunkBytes);
  std::array<Transfer, kPipeline> sends;
  std::array<Transfer, kPipeline> recvs;

  // The k-th message's place in the segment that is `back` ranks behind.
  const auto piece = [&](size_t k, int back) {
    const size_t begin = std::min(ring.block(k) * block_bytes, data.size);
    const Buffer block{data.data + begin,
                       std::min(block_bytes, data.size - begin)};
    const int n = (rank + 2 * size - ring.step(k) - back) % size;
    return ring.cutBlock(segmentOf(block, element, n, size), k);
  };
  const auto received = [&](size_t k) { return piece(k, 1); };
  const auto is_reducing = [&](size_t k) { return ring.step(k) < size - 1; };
  const auto slot = [&](size_t k) {
    return scratch.get() + k % kPipeline * kRingChunkBytes;
  };
  const auto post = [&](size_t k) {
    const Buffer chunk = received(k);
    recvs[k % kPipeline].recv(
        op, ring.left, k, is_reducing(k) ? slot(k) : chunk.data, chunk.size);
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
    if (is_reducing(k)) {
      const Buffer chunk = received(k);
      reduce(op.type, op.reduce_op, chunk.data, slot(k), chunk.data,
             chunk.size);
      if (op.reduce_op == ReduceOp::kAverage && ring.step(k) == size - 2)
        divide(op.type, chunk.data, size, chunk.size);
    }
    if (k + kPipeline < ring.total) post(k + kPipeline);
  }
  for (Transfer& send : sends) co_await send;
}

}  // namespace

Task allReduce(Operation& op) {
  if (op.size() == 1) return barrier(op);  // nothing to do
  return op.outputs[0].size <= kEagerBytes ? doublingAllReduce(op)
                                           : ringAllReduce(op);
}

}  // namespace mnemosyne::ccl
