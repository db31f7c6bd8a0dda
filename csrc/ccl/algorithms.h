// The collectives, each as one coroutine. Operation says which buffers they
// take.
//
// Reduction order depends on the ranks, the sizes and the root, on nothing
// else: a step that is redone gives the same bits.
#pragma once

#include <cstddef>
#include <memory>

#include "ccl/operation.h"
#include "ccl/task.h"

namespace mnemosyne::ccl {

Task allReduce(Operation& op);
Task reduceToRoot(Operation& op);
Task reduceScatter(Operation& op);
Task allGather(Operation& op);
Task allGatherUnequal(Operation& op);
Task broadcast(Operation& op);
Task gather(Operation& op);
Task scatter(Operation& op);
Task allToAll(Operation& op);
Task barrier(Operation& op);
Task monitoredBarrier(Operation& op);
Task sendMessage(Operation& op);
Task receiveMessage(Operation& op);

// The one for op.kind. Requires: the operation outlives it.
Task algorithmFor(Operation& op);

// How many messages a pipeline has in flight: one that is reduced, one that
// arrives, and two that are announced, so that no link runs dry.
constexpr size_t kPipeline = 4;

using Scratch = std::unique_ptr<std::byte[]>;
inline Scratch makeScratch(size_t size) {
  return std::make_unique_for_overwrite<std::byte[]>(size);
}

// The part of a buffer that is its n-th chunk; empty beyond its end.
Buffer chunkOf(const Buffer& buffer, size_t n);
// Number of chunks, at least one.
size_t numChunks(size_t size);

// The messages of a ring, in their order. Long buffers go round in blocks, so
// that what a rank passes on, or adds to, is in its cache still: block by
// block, within it step by step, within that chunk by chunk. What is sent in a
// step was received in the one before, that is `chunks` messages earlier.
struct Ring {
  // `share`: the largest of the parts that go round.
  Ring(const Operation& op, size_t share, int num_steps);

  size_t block(size_t k) const { return k / (steps * chunks); }
  int step(size_t k) const { return static_cast<int>(k / chunks % steps); }
  // The message's chunk of a share.
  Buffer cut(const Buffer& share, size_t k) const;
  // Within a block of it.
  Buffer cutBlock(const Buffer& share_of_block, size_t k) const;
  // How far sending may be ahead of receiving, which is at `k`.
  size_t horizon(size_t k) const;

  int left;
  int right;
  size_t steps;
  size_t chunks;  // of a share, in each block
  size_t total;   // messages
};
// What a ring's message carries at most.
constexpr size_t kRingChunkBytes = 128 * 1024;
// Chunks of a share in a block: while one is reduced, others are on their way.
constexpr size_t kRingChunks = 4;

// A binomial tree over the ranks, counted from the root.
struct Tree {
  Tree(int rank, int size, int root);
  int parent = -1;            // -1 at the root
  std::vector<int> children;  // nearest first
};

}  // namespace mnemosyne::ccl
