#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {
namespace {

// Small: every rank sends each other one its share; all are reduced in rank
// order.
Task directReduceScatter(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  const size_t bytes = op.outputs[0].size;
  const Scratch scratch = makeScratch(bytes * size);
  const auto share = [&](int from) { return scratch.get() + from * bytes; };
  std::vector<Transfer> sends(size);
  std::vector<Transfer> recvs(size);
  for (int distance = 1; distance < size; ++distance) {
    const int to = (rank + distance) % size;
    const int from = (rank + size - distance) % size;
    recvs[from].recv(op, from, 0, share(from), bytes);
    sends[to].send(op, to, 0, op.inputs[to].data, bytes);
  }
  if (bytes > 0) std::memcpy(share(rank), op.inputs[rank].data, bytes);
  for (Transfer& recv : recvs) co_await recv;
  for (Transfer& send : sends) co_await send;
  std::vector<const void*> shares(size);
  for (int from = 0; from < size; ++from) shares[from] = share(from);
  reduceMany(op.type, op.reduce_op, share(0), shares.data(), size, bytes);
  if (op.reduce_op == ReduceOp::kAverage)
    divide(op.type, share(0), size, bytes);
  if (bytes > 0) std::memcpy(op.outputs[0].data, share(0), bytes);
}

// Ring: a partial sum of each share goes round once and ends at its owner.
Task ringReduceScatter(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  const Buffer output = op.outputs[0];
  const Ring ring(op, output.size, size - 1);
  const Scratch scratch = makeScratch(kPipeline * kRingChunkBytes);
  std::array<Transfer, kPipeline> sends;
  std::array<Transfer, kPipeline> recvs;

  // Partial sums of other shares pass through the output, unless it is a part
  // of an input that is still to be added.
  const bool is_in_place =
      std::any_of(op.inputs.begin(), op.inputs.end(), [&](const Buffer& input) {
        return input.data < output.data + output.size &&
               output.data < input.data + input.size;
      });
  const Scratch aside = is_in_place ? makeScratch(output.size) : nullptr;
  const Buffer partial{is_in_place ? aside.get() : output.data, output.size};

  const auto input = [&](size_t k, int back) {
    return ring.cut(op.inputs[(rank + 2 * size - ring.step(k) - back) % size],
                    k);
  };
  const auto slot = [&](size_t k) {
    return scratch.get() + k % kPipeline * kRingChunkBytes;
  };
  const auto post = [&](size_t k) {
    recvs[k % kPipeline].recv(op, ring.left, k, slot(k),
                              ring.cut(partial, k).size);
  };

  for (size_t k = 0; k < std::min(kPipeline, ring.total); ++k) post(k);
  size_t next = 0;
  for (size_t k = 0; k < ring.total; ++k) {
    while (next < ring.horizon(k)) {
      Transfer& send = sends[next % kPipeline];
      co_await send;
      const Buffer chunk =
          ring.step(next) == 0 ? input(next, 1) : ring.cut(partial, next);
      send.send(op, ring.right, next, chunk.data, chunk.size);
      ++next;
    }
    co_await recvs[k % kPipeline];
    // This very chunk of the partial sums may still be on its way out.
    co_await sends[k % kPipeline];
    const Buffer chunk = ring.cut(partial, k);
    reduce(op.type, op.reduce_op, chunk.data, slot(k), input(k, 2).data,
           chunk.size);
    if (op.reduce_op == ReduceOp::kAverage && ring.step(k) == size - 2)
      divide(op.type, chunk.data, size, chunk.size);
    if (k + kPipeline < ring.total) post(k + kPipeline);
  }
  for (Transfer& send : sends) co_await send;
  if (is_in_place) std::memcpy(output.data, aside.get(), output.size);
}

Task copyOwn(Operation& op) {
  const Buffer output = op.outputs[0];
  if (output.size > 0)
    std::memmove(output.data, op.inputs[0].data, output.size);
  co_return;
}

}  // namespace

Task reduceScatter(Operation& op) {
  if (op.size() == 1) return copyOwn(op);
  return op.outputs[0].size <= kEagerBytes ? directReduceScatter(op)
                                           : ringReduceScatter(op);
}

}  // namespace mnemosyne::ccl
