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
  }
  throw std::logic_error("unknown kind of operation");
}

Buffer chunkOf(const Buffer& buffer, size_t n) {
  const size_t begin = std::min(n * kChunkBytes, buffer.size);
  return {buffer.data + begin, std::min(kChunkBytes, buffer.size - begin)};
}

size_t numChunks(size_t size) {
  return std::max<size_t>(1, (size + kChunkBytes - 1) / kChunkBytes);
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
