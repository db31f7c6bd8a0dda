// The engine: runs operations, moves bytes, watches deadlines; and who turns
// it.
#include <sched.h>

#include <algorithm>
#include <cstring>

#include "ccl/algorithms.h"
#include "ccl/mesh.h"
#include "ccl/turn.h"
#include "common/float_mode.h"

namespace mnemosyne::ccl {
namespace {

constexpr int kTurnsBetweenPolls = 16;
// Who submits gives the engine back after that: it has other things to do.
constexpr int kTurnsOfSubmitter = 4;
// How long a helper finds nothing before it sleeps. Some times what a switch to
// each of the other workers on an overcommitted core costs.
constexpr std::chrono::microseconds kPatience{1000};
// A helper is likely to be back within that time, and looks at the links
// itself: bells would wake the progress thread for nothing. Resolution of
// epoll_wait.
constexpr Milliseconds kHelpersPause{1};

bool isMessage(const Operation& op) {
  return op.kind == Kind::kSend || op.kind == Kind::kRecv ||
         op.kind == Kind::kRecvAny;
}

// All ranks compute the same from what they were asked to do; so do both ends
// of a message.
uint16_t signatureOf(const Operation& op) {
  uint64_t mixed = op.agreed;
  if (!isMessage(op)) {
    for (const auto part :
         {static_cast<uint64_t>(op.kind), static_cast<uint64_t>(op.type),
          static_cast<uint64_t>(op.reduce_op), static_cast<uint64_t>(op.root)})
      mixed = (mixed ^ part) * 0x9e3779b97f4a7c15 + 1;
  }
  return static_cast<uint16_t>(mixed >> 48 ^ mixed >> 32 ^ mixed >> 16 ^ mixed);
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
  std::unique_lock<std::mutex> engine(engine_mu_);
  while (!is_broken_down_) {
    // Links in memory can keep us busy for ever: look at the others in between.
    for (int turns = 1; turn(); ++turns)
      if (turns % kTurnsBetweenPolls == 0) loop_.poll();
    const bool is_over = close_by_.expired() || isClosed();
    if (close_by_ < Deadline::never() && is_over) break;
    sleep(engine);
  }
  {
    std::lock_guard<std::mutex> lock(submit_mu_);
    is_closing_ = true;
  }
  // Nothing can be submitted now. What was, ends.
  runSubmissions();
  abortAll(failure_);
  replaying_.reset();
  for (auto& [id, peer] : peers_) peer->discard();
}

void Mesh::sleep(std::unique_lock<std::mutex>& engine) {
  sleeps_until_ = nextDeadline();
  is_armed_ = num_helpers_ == 0 && Clock::now() - helped_at_ >= kHelpersPause;
  is_deaf_ = false;
  if (!is_armed_) {
    sleeps_until_ = std::min(sleeps_until_, Deadline::in(kHelpersPause));
    is_deaf_ = hasSockets() && (num_helpers_ > 0 || flight_ == nullptr);
  } else if (!armLinks()) {
    return loop_.poll();
  }
  loop_.clear();
  is_sleeping_ = true;
  engine.unlock();
  try {
    // Who submitted while we had the engine relies on us.
    if (!hasSubmissions())
      is_deaf_ ? waker_.wait(sleeps_until_) : loop_.wait(sleeps_until_);
    engine.lock();
    is_sleeping_ = false;
    is_deaf_ ? loop_.poll() : loop_.tell();
  } catch (...) {
    if (!engine.owns_lock()) engine.lock();
    breakDown(std::current_exception());
  }
}

Deadline Mesh::nextDeadline() const {
  return std::min(
      {next_timeout_, ask_hosts_at_, connector_.nextDeadline(), close_by_});
}

bool Mesh::hasSubmissions() {
  std::lock_guard<std::mutex> lock(submit_mu_);
  return submitted_first_ != nullptr;
}

// Sees to it that what was submitted is taken: by us, or by who has the engine,
// since every holder comes here, or to sleep(), after it.
void Mesh::drive() {
  while (hasSubmissions()) {
    std::unique_lock<std::mutex> engine(engine_mu_, std::try_to_lock);
    if (!engine) return;
    for (int i = 0; i < kTurnsOfSubmitter && turn(); ++i) {
    }
    letGo();
  }
}

void Mesh::help(const std::atomic<bool>& is_over) {
  if (isInherited()) return;
  ++num_helpers_;
  auto patience = Clock::now() + kPatience;
  bool gives_up = false;
  while (!is_over.load(std::memory_order_acquire) && !gives_up) {
    bool moved = false;
    if (std::unique_lock<std::mutex> engine(engine_mu_, std::try_to_lock);
        engine) {
      gives_up = !lookAtLinks();
      while (!gives_up && !is_over.load(std::memory_order_relaxed) && turn())
        moved = true;
      const auto now = Clock::now();
      if (moved) {
        patience = now + kPatience;
      } else if (now >= patience && armLinks()) {
        gives_up = true;
      }
      helped_at_ = gives_up ? Clock::time_point{} : now;
      if (moved) leaveSockets();
      letGo();
    }
    drive();
    if (!moved && !gives_up) ::sched_yield();
  }
  if (--num_helpers_ > 0) return;
  // What else is in flight is the progress thread's now.
  if (std::unique_lock<std::mutex> engine(engine_mu_, std::try_to_lock);
      engine && is_sleeping_ && is_deaf_ && (flight_ != nullptr || gives_up)) {
    is_sleeping_ = false;
    waker_.wake();
  }
  drive();
}

// A helper that finds news at sockets takes them over: each piece of news would
// wake the progress thread, too, which costs the sender of it more than a read.
void Mesh::leaveSockets() {
  if (!is_sleeping_ || is_deaf_ || !hasSockets()) return;
  is_sleeping_ = false;
  waker_.wake();
}

bool Mesh::hasSockets() const {
  return std::any_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    return entry.second->isSocket();
  });
}

// Before a thread that is not the progress thread lets go of the engine: the
// progress thread takes over what it does not know of.
void Mesh::letGo() {
  if (!is_sleeping_) return;
  // Nobody else hears the sockets that what is in flight now needs.
  const bool is_unheard = is_deaf_ && num_helpers_ == 0 && flight_ != nullptr;
  const bool is_left = hasWork() || is_unheard || is_broken_down_ ||
                       loop_.hasBuried() || close_by_ < Deadline::never();
  // It has asked for bells for what it knew of: not for room where we have
  // filled a link, and not from peers that were ahead.
  if (is_left || nextDeadline() < sleeps_until_ || (is_armed_ && !armLinks())) {
    is_sleeping_ = false;
    waker_.wake();
  }
}

// False if there are no links that must be looked at.
bool Mesh::lookAtLinks() {
  bool has_silent = false;
  bool has_sockets = false;
  for (auto& [id, peer] : peers_) {
    has_silent |= peer->isSilent();
    has_sockets |= peer->isSocket();
    if (peer->hasNews()) onWork(*peer);
  }
  if (has_sockets) loop_.poll();
  return has_silent || has_sockets;
}

// False if there is something to do already.
bool Mesh::armLinks() {
  bool is_quiet = true;
  for (auto& [id, peer] : peers_) {
    if (peer->arm()) continue;
    onWork(*peer);
    is_quiet = false;
  }
  return is_quiet;
}

// Does what can be done without waiting; true if there may be more.
bool Mesh::turn() noexcept {
  const DefaultFloatMode mode;
  try {
    return turnOnce();
  } catch (...) {
    breakDown(std::current_exception());
    return false;
  }
}

// Out of memory or descriptors: nobody may wait for this engine any more.
void Mesh::breakDown(std::exception_ptr error) {
  latch(std::move(error));
  is_broken_down_ = true;
  std::lock_guard<std::mutex> lock(submit_mu_);
  is_closing_ = true;
}

bool Mesh::turnOnce() {
  if (is_broken_down_) return false;
  bool worked = runSubmissions();
  if (std::exchange(must_abort_, false)) abortAll(failure_);
  endClosed();
  worked |= !ready_.empty() || !listed_.empty();
  resumeReady();
  pumpListed();
  connector_.settle();
  if (next_timeout_.expired()) checkDeadlines();
  if (ask_hosts_at_.expired()) checkSilence();
  return worked || hasWork();
}

bool Mesh::hasWork() const {
  return must_abort_ || !closing_.empty() || !missing_.empty() ||
         !listed_.empty() || !ready_.empty();
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

// TCP itself hopes for 15 minutes.
void Mesh::checkSilence() {
  for (auto& [id, peer] : peers_) peer->checkSilence(patience_);
  ask_hosts_at_ = counters_.links_open > 0 ? Deadline::in(patience_ / 5)
                                           : Deadline::never();
}

void Mesh::timeOut(Operation* op) {
  op->late_ranks = op->awaitedRanks();
  const auto error = std::make_exception_ptr(CollectiveTimeout(
      std::string(name(op->kind)) + " of group " + op->group->name() +
          " (sequence " + std::to_string(numberOf(op->sequence_)) +
          "): Timed out waiting " + std::to_string(op->timeout.count()) +
          "ms; rank " + std::to_string(rank_) + " waits for ranks [" +
          joined(op->late_ranks) + "]",
      op->late_ranks.empty() ? -1 : op->late_ranks[0], epoch_));
  // It was asked who is missing: that somebody is, is its answer.
  if (op->kind != Kind::kMonitoredBarrier) return latch(error);
  gave_up_.insert({op->group->id(), op->sequence_});
  finish(op, error);
}

// ---------------------------------------------------------------- operations

void Mesh::start(Operation* op) noexcept {
  try {
    tryToStart(op);
  } catch (...) {
    // Out of memory. The other ranks wait for messages that will not come.
    latch(std::current_exception());
    if (!isInFlight(*op)) finish(op, std::current_exception());
  }
}

void Mesh::tryToStart(Operation* op) {
  op->mesh_ = this;
  ++counters_.operations;
  if (op->group->canAbsorb()) {
    if (replaying_ && !holds_replay_) {
      std::exception_ptr error;
      try {
        replaying_->answer(*op);
      } catch (...) {
        error = std::current_exception();
      }
      return finish(op, error);
    }
    if (recording_ && !holds_replay_) op->record_ = recording_->reserve(*op);
  }
  if (has_failed_) return finish(op, failure_);
  if (epoch_ < 0) {
    return finish(op, std::make_exception_ptr(
                          StaleEpoch("no membership yet: the mesh has not been "
                                     "told its epoch",
                                     -1, -1)));
  }
  try {
    if (op->group->seated_since.empty()) takeIn(*op->group);
  } catch (const ConfigError&) {
    return finish(op, std::current_exception(), false);
  }
  op->group->enter(epoch_);
  if (const std::exception_ptr error = refusal(*op->group)) {
    // Not absorbed: no new epoch would mend it.
    return finish(op, error, false);
  }
  op->signature_ = signatureOf(*op);
  if (op->kind == Kind::kSend) {
    op->sequence_ = kPointToPoint | op->group->nextSend(op->root, op->tag)++;
  } else if (isMessage(*op)) {
    // Its number comes with its turn. Until then it must not be taken for the
    // group's first collective.
    op->sequence_ = kPointToPoint;
  } else {
    op->sequence_ = op->group->nextSequence();
    begun_[op->group->id()] = op->sequence_ + 1;
  }
  op->deadline_ = Deadline::in(op->timeout);
  next_timeout_ = std::min(next_timeout_, op->deadline_);
  op->flight_previous_ = nullptr;
  op->flight_next_ = flight_;
  if (flight_ != nullptr) flight_->flight_previous_ = op;
  flight_ = op;
  ++op->group->num_in_flight;
  if (isContradicted(*op)) return;  // it ends with the failure
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

// `may_absorb`: whether the error may be kept from the user at all.
void Mesh::finish(Operation* op, std::exception_ptr error,
                  bool may_absorb) noexcept {
  // While all that they point to is there still.
  while (op->pending_ != nullptr) op->pending_->withdraw();
  op->task_.reset();
  Operation* next = op->flight_next_;
  Operation* previous = op->flight_previous_;
  const bool was_in_flight = isInFlight(*op);
  if (was_in_flight) (previous ? previous->flight_next_ : flight_) = next;
  if (next != nullptr) next->flight_previous_ = previous;
  if (op->is_ready_)
    std::replace(ready_.begin(), ready_.end(), op,
                 static_cast<Operation*>(nullptr));

  const bool is_absorbed =
      error && may_absorb && absorbs_ && op->group->canAbsorb();
  try {
    if (was_in_flight) {
      Group& group = *op->group;
      if (--group.num_in_flight == 0 && group.is_leaving)
        closeGroup(group.id(), group.generation(), Closing::kLeft, rank_);
      note(*op, error, is_absorbed);
    }
    if (is_absorbed) {
      ++counters_.absorbed;
      error = nullptr;
      if (isPureOutput(*op)) zeroOutputs(*op);
    } else if (!error && recording_ && op->record_ != SIZE_MAX) {
      recording_->record(*op, op->record_);
    }
    if (!error && (!is_absorbed || isPureOutput(*op))) op->unstage();
  } catch (...) {
    error = std::current_exception();
  }
  op->complete(error, *callbacks_);
}

void Mesh::note(const Operation& op, const std::exception_ptr& error,
                bool is_absorbed) {
  Finished one;
  one.group = op.group;
  one.kind = op.kind;
  one.type_name = op.type_name;
  one.sequence = numberOf(op.sequence_);
  one.num_bytes = op.numBytes();
  one.began = op.deadline_.begin(op.timeout);
  one.ended = Clock::now();
  if (error) {
    one.outcome = is_absorbed ? Outcome::kAbsorbed : Outcome::kFailed;
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& known) {
      one.error = known.what();
    }
  }
  history_.add(std::move(one));
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
  // One that is over has had all its messages, unless it gave up alone.
  const auto it = begun_.find(key.group);
  return it != begun_.end() && key.sequence < it->second &&
         !gave_up_.count({key.group, key.sequence});
}

// By what others have sent before it began.
bool Mesh::isContradicted(Operation& op) {
  if (isMessage(op)) return false;
  for (int rank = 0; rank < op.size(); ++rank) {
    if (rank == op.rank()) continue;
    Peer* peer = op.group->peer(rank);
    if (peer == nullptr) {
      const auto it =
          peers_.find(members_[op.group->globalRank(rank)].worker_id);
      if (it == peers_.end()) continue;
      peer = it->second.get();
    }
    if (peer->differs({op.group->id(), op.sequence_, 0}, op.signature_))
      return true;
  }
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
