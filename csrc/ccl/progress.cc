// The progress thread: runs operations, moves bytes, watches deadlines.
#include <algorithm>
#include <cstring>

#include "ccl/algorithms.h"
#include "ccl/mesh.h"
#include "ccl/turn.h"

namespace mnemosyne::ccl {
namespace {

constexpr int kTurnsBetweenPolls = 16;

// All ranks compute the same from what they were asked to do.
uint16_t signatureOf(const Operation& op) {
  switch (op.kind) {
    case Kind::kSend:
    case Kind::kRecv:
    case Kind::kRecvAny:
      return 0;
    default:
      break;
  }
  uint32_t mixed = static_cast<uint32_t>(op.kind);
  mixed = mixed * 31 + static_cast<uint32_t>(op.type);
  mixed = mixed * 31 + static_cast<uint32_t>(op.reduce_op);
  mixed = mixed * 31 + static_cast<uint32_t>(op.root);
  return static_cast<uint16_t>(mixed ^ mixed >> 16);
}

bool isPureOutput(const Operation& op) {
  switch (op.kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
      return false;
    case Kind::kBroadcast:
      return op.rank() != op.root;
    default:
      return true;
  }
}

bool overlap(const Buffer& a, const Buffer& b) {
  return a.data < b.data + b.size && b.data < a.data + a.size;
}

// What an absorbed operation leaves behind must be finite, and inputs
// unchanged: an output may be a part of one.
void zeroOutputs(const Operation& op) {
  for (const Buffer& output : op.outputs) {
    const bool is_input = std::any_of(
        op.inputs.begin(), op.inputs.end(),
        [&](const Buffer& input) { return overlap(input, output); });
    if (!is_input && output.size > 0) std::memset(output.data, 0, output.size);
  }
}

}  // namespace

void Mesh::loop() {
  nameThread("mnemo-progress");
  try {
    while (true) {
      // Links in memory can keep us busy for ever: look at the others in
      // between.
      for (int turns = 1; turn(); ++turns)
        if (turns % kTurnsBetweenPolls == 0) loop_.poll(Deadline::in({}));
      const bool is_over = close_by_.expired() || isClosed();
      if (close_by_ < Deadline::never() && is_over) break;
      sleep();
    }
  } catch (...) {
    // Out of memory or descriptors: nobody may wait for this thread any more.
    latch(std::current_exception());
    std::lock_guard<std::mutex> lock(submit_mu_);
    is_closing_ = true;
  }
  // Nothing can be submitted now. What was, ends.
  runSubmissions();
  abortAll(failure_);
  replaying_.reset();
  for (auto& [id, peer] : peers_) peer->discard();
}

// Does what can be done without waiting; true if there may be more.
bool Mesh::turn() {
  bool worked = runSubmissions();
  if (std::exchange(must_abort_, false)) abortAll(failure_);
  worked |= !ready_.empty() || !listed_.empty();
  resumeReady();
  pumpListed();
  connector_.settle();
  if (next_timeout_.expired()) checkDeadlines();
  return worked || must_abort_ || !listed_.empty();
}

void Mesh::sleep() {
  {
    std::lock_guard<std::mutex> lock(submit_mu_);
    if (submitted_first_ != nullptr) return;
    is_sleeping_ = true;
  }
  loop_.poll(std::min({next_timeout_, connector_.nextDeadline(), close_by_}));
  std::lock_guard<std::mutex> lock(submit_mu_);
  is_sleeping_ = false;
}

bool Mesh::runSubmissions() {
  Submission* next;
  {
    std::lock_guard<std::mutex> lock(submit_mu_);
    next = std::exchange(submitted_first_, nullptr);
    submitted_last_ = nullptr;
  }
  const bool worked = next != nullptr;
  while (next != nullptr) {
    Submission* current = next;
    next = current->next_;  // first: running it may be its end
    current->run(*this);
  }
  return worked;
}

void Mesh::resumeReady() {
  // A coroutine may make others ready, itself included.
  for (size_t i = 0; i < ready_.size(); ++i) {
    Operation* op = ready_[i];
    if (op == nullptr) continue;
    op->is_ready_ = false;
    resume(op);
  }
  ready_.clear();
}

void Mesh::pumpListed() {
  std::swap(pumping_, listed_);
  for (size_t i = 0; i < pumping_.size(); ++i) {
    Peer* peer = pumping_[i];
    if (peer == nullptr) continue;
    peer->is_listed = false;
    peer->pump();
  }
  pumping_.clear();
}

void Mesh::checkDeadlines() {
  Operation* late = nullptr;
  Deadline next = Deadline::never();
  for (Operation* op = flight_; op != nullptr; op = op->flight_next_) {
    if (op->deadline_.expired()) late = op;  // the list's end is the oldest
    next = std::min(next, op->deadline_);
  }
  next_timeout_ = next;
  if (late != nullptr) timeOut(late);
}

void Mesh::timeOut(Operation* op) {
  std::string ranks;
  int first = -1;
  for (int rank : op->awaitedRanks()) {
    if (first < 0) first = rank;
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  }
  latch(std::make_exception_ptr(CollectiveTimeout(
      std::string(name(op->kind)) + " of group " + op->group->name() +
          " (sequence " + std::to_string(op->sequence_ & ~kPointToPoint) +
          ") did not finish within " + std::to_string(op->timeout.count()) +
          " ms; rank " + std::to_string(rank_) + " waits for ranks [" + ranks +
          "]",
      first, epoch_)));
}

// ---------------------------------------------------------------- operations

void Mesh::start(Operation* op) {
  op->mesh_ = this;
  ++counters_.operations;
  if (op->group->canAbsorb()) {
    if (replaying_) {
      std::exception_ptr error;
      try {
        replaying_->answer(*op);
      } catch (...) {
        error = std::current_exception();
      }
      return finish(op, error);
    }
    if (recording_) op->record_ = recording_->reserve(*op);
  }
  if (has_failed_) return finish(op, failure_);
  if (epoch_ < 0) {
    return finish(op, std::make_exception_ptr(
                          StaleEpoch("no membership yet: the mesh has not been "
                                     "told its epoch",
                                     -1, -1)));
  }
  op->group->enter(epoch_);
  op->signature_ = signatureOf(*op);
  if (op->kind == Kind::kSend) {
    op->sequence_ = kPointToPoint | op->group->nextSend(op->root, op->tag)++;
  } else if (op->kind != Kind::kRecv && op->kind != Kind::kRecvAny) {
    op->sequence_ = op->group->nextSequence();
  }
  op->deadline_ = Deadline::in(op->timeout);
  next_timeout_ = std::min(next_timeout_, op->deadline_);
  op->flight_previous_ = nullptr;
  op->flight_next_ = flight_;
  if (flight_ != nullptr) flight_->flight_previous_ = op;
  flight_ = op;
  op->task_ = algorithmFor(*op);
  resume(op);
}

void Mesh::resume(Operation* op) {
  op->awaited_ = nullptr;
  op->task_.resume();
  if (!op->task_.done()) return;
  const std::exception_ptr error = op->task_.error();
  // The other ranks wait for messages that will not come.
  if (error) latch(error);
  finish(op, error);
}

void Mesh::ready(Operation* op) {
  op->awaited_ = nullptr;
  if (std::exchange(op->is_ready_, true)) return;
  ready_.push_back(op);
}

void Mesh::finish(Operation* op, std::exception_ptr error) {
  op->task_.reset();
  Operation* next = op->flight_next_;
  Operation* previous = op->flight_previous_;
  if (previous != nullptr || flight_ == op)
    (previous ? previous->flight_next_ : flight_) = next;
  if (next != nullptr) next->flight_previous_ = previous;
  if (op->is_ready_)
    std::replace(ready_.begin(), ready_.end(), op,
                 static_cast<Operation*>(nullptr));

  const bool is_absorbed = error && absorbs_ && op->group->canAbsorb();
  if (is_absorbed) {
    ++counters_.absorbed;
    error = nullptr;
    if (isPureOutput(*op)) zeroOutputs(*op);
  } else if (!error && recording_ && op->record_ != SIZE_MAX) {
    recording_->record(*op, op->record_);
  }
  if (!error && (!is_absorbed || isPureOutput(*op))) {
    try {
      op->unstage();
    } catch (...) {
      error = std::current_exception();
    }
  }
  op->complete(error, *callbacks_);
}

void Mesh::abortAll(const std::exception_ptr& error) {
  const std::exception_ptr kept = error;  // it may be cleared meanwhile
  while (flight_ != nullptr) finish(flight_, kept);
}

void Mesh::onTransferDone(Operation* op, Transfer* transfer) {
  if (op->awaited_ == transfer) ready(op);
}

bool Mesh::contradicts(const MessageKey& key, uint16_t signature) {
  if (key.sequence & kPointToPoint) return false;
  for (Operation* op = flight_; op != nullptr; op = op->flight_next_)
    if (op->sequence_ == key.sequence && op->group->id() == key.group)
      return op->signature_ != signature;
  return false;
}

void Mesh::onWork(Peer& peer) {
  if (std::exchange(peer.is_listed, true)) return;
  listed_.push_back(&peer);
}

void Mesh::onBytes(size_t sent, size_t received) {
  if (sent > 0) counters_.bytes_sent.fetch_add(sent, std::memory_order_relaxed);
  if (received > 0)
    counters_.bytes_received.fetch_add(received, std::memory_order_relaxed);
}

// ---------------------------------------------------------------- receive
// turns

void Mesh::addTurn(Turn* turn) {
  Operation& op = turn->op_;
  auto& queue = turns_[{op.group->id(), op.tag}];
  if (queue.empty() && turn->from_ >= 0) {
    turn->settle(turn->from_);
    return;
  }
  queue.push_back(turn);
  turn->is_queued_ = true;
  // A message can only come over a link.
  for (int rank = 0; rank < op.size(); ++rank)
    if (rank != op.rank() && (turn->from_ < 0 || turn->from_ == rank))
      peerOf(op, rank);
  scanTurns(op.group->id(), op.tag);
}

void Mesh::removeTurn(Turn* turn) {
  const auto it = turns_.find({turn->op_.group->id(), turn->op_.tag});
  if (it == turns_.end()) return;
  std::erase(it->second, turn);
  if (it->second.empty()) turns_.erase(it);
}

// Gives the messages that are here to those that wait for one, in order.
void Mesh::scanTurns(uint64_t group_id, uint64_t tag) {
  const auto it = turns_.find({group_id, tag});
  if (it == turns_.end()) return;
  auto& queue = it->second;
  for (size_t i = 0; i < queue.size();) {
    Turn* turn = queue[i];
    Operation& op = turn->op_;
    for (int rank = 0; rank < op.size() && turn->source_ < 0; ++rank) {
      if (rank == op.rank() || (turn->from_ >= 0 && turn->from_ != rank))
        continue;
      const uint64_t number = op.group->nextRecv(rank, tag);
      if (peerOf(op, rank).hasArrived({group_id, kPointToPoint | number, tag}))
        turn->settle(rank);
    }
    if (turn->source_ < 0) {
      ++i;
      continue;
    }
    turn->is_queued_ = false;
    queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(i));
    if (op.awaited_ == turn) ready(&op);
  }
  if (queue.empty()) turns_.erase(it);
}

void Mesh::onArrival(Peer&, const MessageKey& key) {
  scanTurns(key.group, key.tag);
}

}  // namespace mnemosyne::ccl
