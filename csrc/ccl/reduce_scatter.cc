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
  for (int from = 1; from < size; ++from)
    reduce(op.type, op.reduce_op, share(0), share(0), share(from), bytes);
  if (op.reduce_op == ReduceOp::kAverage)
    divide(op.type, share(0), size, bytes);
  if (bytes > 0) std::memcpy(op.outputs[0].data, share(0), bytes);
}

// Ring: a partial sum of each share goes round once and ends at its owner.
Task ringReduceScatter(Operation& op) {
  const int rank = op.rank();
  const int size = op.size();
  const int left = (rank + size - 1) % size;
  const int right = (rank + 1) % size;
  const Buffer output = op.outputs[0];
  const size_t chunks = numChunks(output.size);
  const size_t total = (size - 1) * chunks;
  const Scratch scratch = makeScratch(kPipeline * kChunkBytes);
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
    const int step = static_cast<int>(k / chunks);
    return chunkOf(op.inputs[(rank + 2 * size - step - back) % size],
                   k % chunks);
  };
  const auto slot = [&](size_t k) {
    return scratch.get() + k % kPipeline * kChunkBytes;
  };
  const auto post = [&](size_t k) {
    recvs[k % kPipeline].recv(op, left, k, slot(k),
                              chunkOf(partial, k % chunks).size);
  };

  for (size_t k = 0; k < std::min(kPipeline, total); ++k) post(k);
  size_t next = 0;
  for (size_t k = 0; k < total; ++k) {
    while (next < std::min({total, k + kPipeline, k + chunks})) {
      Transfer& send = sends[next % kPipeline];
      co_await send;
      const Buffer chunk =
          next < chunks ? input(next, 1) : chunkOf(partial, next % chunks);
      send.send(op, right, next, chunk.data, chunk.size);
      ++next;
    }
    co_await recvs[k % kPipeline];
    // This very chunk of the partial sums may still be on its way out.
    co_await sends[k % kPipeline];
    const Buffer chunk = chunkOf(partial, k % chunks);
    reduce(op.type, op.reduce_op, chunk.data, slot(k), input(k, 2).data,
           chunk.size);
    if (op.reduce_op == ReduceOp::kAverage && k + chunks >= total)
      divide(op.type, chunk.data, size, chunk.size);
    if (k + kPipeline < total) post(k + kPipeline);
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
