#include "ccl/operation.h"

#include <algorithm>

#include "ccl/mesh.h"
#include "ccl/turn.h"

namespace mnemosyne::ccl {

const char* name(Kind kind) {
  switch (kind) {
    case Kind::kAllReduce:
      return "all-reduce";
    case Kind::kReduce:
      return "reduce";
    case Kind::kReduceScatter:
      return "reduce-scatter";
    case Kind::kAllGather:
      return "all-gather";
    case Kind::kBroadcast:
      return "broadcast";
    case Kind::kGather:
      return "gather";
    case Kind::kScatter:
      return "scatter";
    case Kind::kAllToAll:
      return "all-to-all";
    case Kind::kBarrier:
      return "barrier";
    case Kind::kMonitoredBarrier:
      return "monitored barrier";
    case Kind::kSend:
      return "send";
    case Kind::kRecv:
      return "receive";
    case Kind::kRecvAny:
      return "receive from any";
    case Kind::kAllGatherUnequal:
      return "all-gather of unequal shares";
  }
  return "unknown operation";
}

std::string joined(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks)
    text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

void Operation::run(Mesh& mesh) noexcept { mesh.start(this); }

size_t Operation::numBytes() const {
  const auto total = [](const std::vector<Buffer>& buffers) {
    size_t bytes = 0;
    for (const Buffer& buffer : buffers) bytes += buffer.size;
    return bytes;
  };
  return std::max(total(inputs), total(outputs));
}

void Operation::addPending(Transfer* transfer) {
  transfer->op_previous_ = nullptr;
  transfer->op_next_ = pending_;
  if (pending_ != nullptr) pending_->op_previous_ = transfer;
  pending_ = transfer;
}

void Operation::removePending(Transfer* transfer) {
  Transfer* next = transfer->op_next_;
  Transfer* previous = transfer->op_previous_;
  (previous ? previous->op_next_ : pending_) = next;
  if (next != nullptr) next->op_previous_ = previous;
  transfer->op_next_ = transfer->op_previous_ = nullptr;
}

std::vector<int> Operation::awaitedRanks() const {
  std::vector<int> ranks;
  for (Transfer* at = pending_; at != nullptr; at = at->op_next_)
    ranks.push_back(mesh_->rankOf(at->peer_->workerId()));
  // A receive that does not know yet whose message it gets.
  const bool is_recv = kind == Kind::kRecv || kind == Kind::kRecvAny;
  if (is_recv && pending_ == nullptr)
    for (int rank = 0; rank < size(); ++rank)
      if (rank != this->rank() && (kind == Kind::kRecvAny || rank == root))
        ranks.push_back(group->globalRank(rank));
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

bool Operation::awaits(const Peer& peer) const {
  for (Transfer* at = pending_; at != nullptr; at = at->op_next_)
    if (at->peer_ == &peer) return true;
  return false;
}

// ---------------------------------------------------------------- Transfer

void Transfer::send(Operation& op, int group_rank, uint64_t tag,
                    const void* data, size_t size) {
  auto* bytes = const_cast<std::byte*>(static_cast<const std::byte*>(data));
  start(op, group_rank, tag, bytes, size, true);
}

void Transfer::recv(Operation& op, int group_rank, uint64_t tag, void* data,
                    size_t size) {
  start(op, group_rank, tag, static_cast<std::byte*>(data), size, false);
}

void Transfer::start(Operation& op, int group_rank, uint64_t tag,
                     std::byte* data, size_t size, bool is_send) {
  op_ = &op;
  peer_ = &op.mesh_->peerOf(op, group_rank);
  key_ = {op.group->id(), op.sequence(), tag};
  data_ = data;
  size_ = size;
  moved_ = 0;
  is_send_ = is_send;
  is_pending_ = true;
  op.addPending(this);
  peer_->post(this);
}

void Transfer::withdraw() {
  if (!is_pending_) return;
  is_pending_ = false;
  op_->removePending(this);
  peer_->withdraw(this);
}

void Transfer::finish() {
  is_pending_ = false;
  op_->removePending(this);
  op_->mesh_->onTransferDone(op_, this);
}

void Transfer::Awaiter::await_suspend(std::coroutine_handle<>) const {
  transfer->op_->awaited_ = transfer;
}

uint16_t Transfer::op_signature() const { return op_->signature(); }

// ---------------------------------------------------------------- Turn

Turn::Turn(Operation& op, int from) : op_(op), from_(from) {
  op_.mesh_->addTurn(this);
}

Turn::~Turn() {
  if (is_queued_) op_.mesh_->removeTurn(this);
}

void Turn::settle(int rank) {
  source_ = rank;
  op_.sequence_ = kPointToPoint | op_.group->nextRecv(rank, op_.tag)++;
}

}  // namespace mnemosyne::ccl
