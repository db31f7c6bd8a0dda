#include "ccl/algorithms.h"

#include <algorithm>
#include <stdexcept>

namespace mnemosyne::ccl {

Task algorithmFor(Operation& op) {
  switch (op.kind) {
    case Kind::kAllReduce:
      return allReduce(op);
    case Kind::kReduce:
      return reduceToRoot(op);
    case Kind::kReduceScatter:
      return reduceScatter(op);
    case Kind::kAllGather:
      return allGather(op);
    case Kind::kBroadcast:
      return broadcast(op);
    case Kind::kGather:
      return gather(op);
    case Kind::kScatter:
      return scatter(op);
    case Kind::kAllToAll:
      return allToAll(op);
    case Kind::kBarrier:
      return barrier(op);
    case Kind::kMonitoredBarrier:
      return monitoredBarrier(op);
    case Kind::kSend:
      return sendMessage(op);
    case Kind::kRecv:
    case Kind::kRecvAny:
      return receiveMessage(op);
    case Kind::kAllGatherUnequal:
      return allGatherUnequal(op);
  }
  throw std::logic_error("unknown kind of operation");
}

namespace {

Buffer pieceOf(const Buffer& buffer, size_t n, size_t size) {
  const size_t begin = std::min(n * size, buffer.size);
  return {buffer.data + begin, std::min(size, buffer.size - begin)};
}

}  // namespace

Buffer chunkOf(const Buffer& buffer, size_t n) {
  return pieceOf(buffer, n, kChunkBytes);
}

size_t numChunks(size_t size) {
  return std::max<size_t>(1, (size + kChunkBytes - 1) / kChunkBytes);
}

Ring::Ring(const Operation& op, size_t share, int num_steps)
    : left((op.rank() + op.size() - 1) % op.size()),
      right((op.rank() + 1) % op.size()),
      steps(static_cast<size_t>(num_steps)) {
  const size_t all =
      std::max<size_t>(1, (share + kRingChunkBytes - 1) / kRingChunkBytes);
  chunks = std::min(all, kRingChunks);
  total = (all + chunks - 1) / chunks * steps * chunks;
}

Buffer Ring::cut(const Buffer& share, size_t k) const {
  return pieceOf(share, block(k) * chunks + k % chunks, kRingChunkBytes);
}

Buffer Ring::cutBlock(const Buffer& share_of_block, size_t k) const {
  return pieceOf(share_of_block, k % chunks, kRingChunkBytes);
}

size_t Ring::horizon(size_t k) const {
  return std::min({total, k + kPipeline, k + chunks});
}

Tree::Tree(int rank, int size, int root) {
  const int place = (rank - root + size) % size;
  int bit = 1;
  for (; bit < size; bit <<= 1) {
    if (place & bit) {
      parent = (place - bit + root) % size;
      break;
    }
    if (place + bit < size) children.push_back((place + bit + root) % size);
  }
}

}  // namespace mnemosyne::ccl
