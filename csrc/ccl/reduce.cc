#include <algorithm>
#include <array>
#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {

// Binomial tree, in chunks. Buffers of ranks other than the root are only read.
Task reduceToRoot(Operation& op) {
  const Buffer data = op.outputs[0];
  const Tree tree(op.rank(), op.size(), op.root);
  const size_t num_children = tree.children.size();
  const size_t chunks = numChunks(data.size);
  const size_t lane = std::min(kChunkBytes, data.size);
  const Scratch arrived = makeScratch(num_children * kPipeline * lane);
  const Scratch summed = makeScratch(num_children > 0 ? kPipeline * lane : 0);
  std::vector<Transfer> recvs(num_children * kPipeline);
  std::array<Transfer, kPipeline> sends;

  const auto place = [&](size_t child, size_t k) {
    return child * kPipeline + k % kPipeline;
  };
  const auto post = [&](size_t child, size_t k) {
    recvs[place(child, k)].recv(op, tree.children[child], k,
                                arrived.get() + place(child, k) * lane,
                                chunkOf(data, k).size);
  };

  for (size_t k = 0; k < std::min(kPipeline, chunks); ++k)
    for (size_t child = 0; child < num_children; ++child) post(child, k);
  for (size_t k = 0; k < chunks; ++k) {
    const Buffer chunk = chunkOf(data, k);
    Transfer& send = sends[k % kPipeline];
    co_await send;
    std::byte* sum = chunk.data;
    if (tree.parent >= 0 && num_children > 0)
      sum = summed.get() + k % kPipeline * lane;
    for (size_t child = 0; child < num_children; ++child) {
      co_await recvs[place(child, k)];
      reduce(op.type, op.reduce_op, sum, child == 0 ? chunk.data : sum,
             arrived.get() + place(child, k) * lane, chunk.size);
      if (k + kPipeline < chunks) post(child, k + kPipeline);
    }
    if (tree.parent >= 0) {
      send.send(op, tree.parent, k, sum, chunk.size);
    } else if (op.reduce_op == ReduceOp::kAverage) {
      divide(op.type, sum, op.size(), chunk.size);
    }
  }
  for (Transfer& send : sends) co_await send;
}

}  // namespace mnemosyne::ccl
