#include <algorithm>
#include <array>
#include <vector>

#include "ccl/algorithms.h"

namespace mnemosyne::ccl {

// Binomial tree, in chunks, so that all its levels work at the same time.
Task broadcast(Operation& op) {
  const Buffer data = op.outputs[0];
  const Tree tree(op.rank(), op.size(), op.root);
  // Chunks let a rank pass on what has come. Of two ranks none does, and each
  // chunk would cost a grant.
  const bool is_whole = op.size() == 2;
  const size_t chunks = is_whole ? 1 : numChunks(data.size);
  const auto piece = [&](size_t k) {
    return is_whole ? data : chunkOf(data, k);
  };
  std::array<Transfer, kPipeline> recvs;
  std::vector<Transfer> sends(tree.children.size() * kPipeline);

  const auto post = [&](size_t k) {
    const Buffer chunk = piece(k);
    recvs[k % kPipeline].recv(op, tree.parent, k, chunk.data, chunk.size);
  };

  if (tree.parent >= 0)
    for (size_t k = 0; k < std::min(kPipeline, chunks); ++k) post(k);
  for (size_t k = 0; k < chunks; ++k) {
    co_await recvs[k % kPipeline];
    const Buffer chunk = piece(k);
    // The farthest child has the largest subtree below it.
    for (size_t i = tree.children.size(); i-- > 0;) {
      Transfer& send = sends[i * kPipeline + k % kPipeline];
      co_await send;
      send.send(op, tree.children[i], k, chunk.data, chunk.size);
    }
    if (tree.parent >= 0 && k + kPipeline < chunks) post(k + kPipeline);
  }
  for (Transfer& send : sends) co_await send;
}

}  // namespace mnemosyne::ccl
