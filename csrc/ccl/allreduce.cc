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

// The buffer cut into one segment per rank, on element boundaries.
class Segments {
 public:
  Segments(const Buffer& data, size_t element, int size)
      : data_(data),
        element_(element),
        count_(data.size / element),
        size_(size) {}

  Buffer at(int index) const {
    const auto i = static_cast<size_t>(((index % size_) + size_) % size_);
    const size_t begin = count_ * i / size_;
    const size_t end = count_ * (i + 1) / size_;
    return {data_.data + begin * element_, (end - begin) * element_};
  }
  size_t largest() const { return (count_ + size_ - 1) / size_ * element_; }

 private:
  Buffer data_;
  size_t element_;
  size_t count_;
  int size_;
};

// Ring: each segment goes round once to be summed and once more to be handed
// out, in chunks, so that a chunk is passed on while the next one arrives.
Task ringAllReduce(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  const int left = (rank + size - 1) % size;
  const int right = (rank + 1) % size;
  const Segments segments(op.outputs[0], elementBytes(op.type), size);
  const size_t chunks = numChunks(segments.largest());
  const size_t reducing = (size - 1) * chunks;
  const size_t total = 2 * reducing;
  const Scratch scratch = makeScratch(kPipeline * kChunkBytes);
  std::array<Transfer, kPipeline> sends;
  std::array<Transfer, kPipeline> recvs;

  // The k-th message of the ring: what is sent, and what is received.
  const auto sent = [&](size_t k) {
    const int step = static_cast<int>(k / chunks);
    return chunkOf(segments.at(k < reducing ? rank - step : rank + size - step),
                   k % chunks);
  };
  const auto received = [&](size_t k) {
    const int step = static_cast<int>(k / chunks);
    return chunkOf(
        segments.at(k < reducing ? rank - step - 1 : rank + size - 1 - step),
        k % chunks);
  };
  const auto slot = [&](size_t k) {
    return scratch.get() + k % kPipeline * kChunkBytes;
  };
  const auto post = [&](size_t k) {
    const Buffer chunk = received(k);
    recvs[k % kPipeline].recv(op, left, k, k < reducing ? slot(k) : chunk.data,
                              chunk.size);
  };

  for (size_t k = 0; k < std::min(kPipeline, total); ++k) post(k);
  size_t next = 0;
  for (size_t k = 0; k < total; ++k) {
    // What is sent was received one step, that is `chunks` messages, before.
    while (next < std::min({total, k + kPipeline, k + chunks})) {
      Transfer& send = sends[next % kPipeline];
      co_await send;
      const Buffer chunk = sent(next);
      send.send(op, right, next, chunk.data, chunk.size);
      ++next;
    }
    co_await recvs[k % kPipeline];
    if (k < reducing) {
      const Buffer chunk = received(k);
      reduce(op.type, op.reduce_op, chunk.data, slot(k), chunk.data,
             chunk.size);
      if (op.reduce_op == ReduceOp::kAverage && k + chunks >= reducing)
        divide(op.type, chunk.data, size, chunk.size);
    }
    if (k + kPipeline < total) post(k + kPipeline);
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
