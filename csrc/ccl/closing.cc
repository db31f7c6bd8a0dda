// How one group ends while the others go on: aborted, left, or displaced by a
// membership that its ranks do not fit. docs/design.md, "Groups end one by
// one".
#include <algorithm>
#include <string>

#include "ccl/mesh.h"

namespace mnemosyne::ccl {
namespace {

std::exception_ptr aborted(const Group& group, const std::string& how, int rank,
                           int64_t epoch) {
  return std::make_exception_ptr(GroupAborted(
      "group " + group.name() + " " + how + " rank " + std::to_string(rank) +
          "; reconfigure it or make it anew",
      rank, epoch));
}

}  // namespace

// ---------------------------------------------------------------- any thread

void Mesh::abort(Group& group) {
  if (isInherited()) return;
  const auto action = [&] {
    if (epoch_ < 0) return;
    if (absorbs_ && group.canAbsorb()) {
      latch(std::make_exception_ptr(StaleEpoch(
          "group " + group.name() + " was aborted within a step", -1, epoch_)));
      abortAll(failure_);
      return;
    }
    group.enter(epoch_);
    closeGroup(group.id(), group.generation(), Closing::kAborted, rank_);
    endClosed();
  };
  performIfOpen(action);
}

void Mesh::leave(Group& group) {
  if (isInherited()) return;
  const auto action = [&] {
    if (group.is_leaving) return;
    group.is_leaving = true;
    if (epoch_ < 0 || group.num_in_flight > 0) return;
    group.enter(epoch_);
    closeGroup(group.id(), group.generation(), Closing::kLeft, rank_);
    endClosed();
  };
  performIfOpen(action);
}

std::exception_ptr Mesh::failureOf(Group& group) {
  std::exception_ptr error;
  perform([&] {
    error = failure_;
    if (error || epoch_ < 0) return;
    group.enter(epoch_);
    error = refusal(group);
  });
  return error;
}

void Mesh::adopt(Group& group) {
  perform([&] { takeIn(group); });
}

void Mesh::replace(Group& former, Group& next) {
  perform([&] {
    takeIn(next);  // first: it may be refused
    if (former.isIn(epoch_)) {
      // Others may still be at what this rank has done: they need not end.
      const Closing why =
          former.num_in_flight > 0 ? Closing::kAborted : Closing::kLeft;
      closeGroup(former.id(), former.generation(), why, rank_);
      endClosed();
      takeIn(next);  // it may be a namesake
    }
    const auto it = closed_.find(former.id());
    if (it != closed_.end()) it->second.is_replaced = true;
  });
}

Mesh::Membership Mesh::membership() {
  Membership now;
  perform([&] { now = {epoch_, rank_, members_}; });
  return now;
}

void Mesh::excuse(const std::vector<uint64_t>& worker_ids) {
  perform([&] {
    for (uint64_t id : worker_ids) peerOf(id).is_excused = true;
  });
}

bool Mesh::advance() {
  bool has_moved = false;
  perform([&] {
    if (is_locked_) return;
    int64_t epoch = has_failed_ ? epoch_ + 1 : epoch_;
    for (const auto& [id, peer] : peers_)
      if (rankOf(id) >= 0) epoch = std::max(epoch, peer->epoch());
    if (epoch <= epoch_) return;
    moveTo(epoch, rank_, members_, false);
    has_moved = true;
  });
  return has_moved;
}

// What does not matter any more when the mesh is closed.
void Mesh::performIfOpen(const std::function<void()>& action) {
  try {
    perform(action);
  } catch (const std::runtime_error&) {
    std::lock_guard<std::mutex> lock(submit_mu_);
    if (!is_closing_) throw;
  }
}

// ---------------------------------------------------------------- the engine

void Mesh::takeIn(Group& group) {
  std::vector<int64_t> since;
  for (int seat : group.globalRanks()) {
    if (seat < 0 || seat >= static_cast<int>(seated_since_.size())) {
      throw ConfigError("group " + group.name() + " names rank " +
                        std::to_string(seat) + " of a membership of " +
                        std::to_string(seated_since_.size()));
    }
    since.push_back(seated_since_[seat]);
  }
  group.seated_since = std::move(since);
  group.enter(epoch_);
  const auto it = closed_.find(group.id());
  if (it == closed_.end()) return;
  group.setGeneration(it->second.num_generations);
  it->second.is_open = true;
}

// A seat is as before if its worker is, or if that one has left and one that is
// new has come in its place. With any other change ranks mean something else.
void Mesh::stampSeats(const std::vector<Member>& members, int64_t epoch) {
  std::set<uint64_t> before;
  std::set<uint64_t> after;
  for (const Member& member : members_) before.insert(member.worker_id);
  for (const Member& member : members) after.insert(member.worker_id);
  std::vector<int64_t> since(members.size(), epoch);
  for (size_t r = 0; r < std::min(members.size(), members_.size()); ++r) {
    const uint64_t old_id = members_[r].worker_id;
    const uint64_t new_id = members[r].worker_id;
    if (old_id == new_id || (!after.count(old_id) && !before.count(new_id)))
      since[r] = seated_since_[r];
  }
  seated_since_ = std::move(since);
}

bool Mesh::hasClosed(const Group& group) const {
  const auto it = closed_.find(group.id());
  return it != closed_.end() && group.generation() < it->second.num_generations;
}

bool Mesh::isClosed(const MessageKey& key) const {
  const auto it = closed_.find(key.group);
  return it != closed_.end() &&
         generationOf(key.sequence) < it->second.num_generations;
}

std::exception_ptr Mesh::refusal(const Group& group) const {
  if (group.is_leaving)
    return aborted(group, "was shut down by this", rank_, epoch_);
  for (int r = 0; r < group.size(); ++r) {
    const int seat = group.globalRank(r);
    if (seat < static_cast<int>(seated_since_.size()) &&
        seated_since_[seat] == group.seated_since[r]) {
      continue;
    }
    return std::make_exception_ptr(StaleEpoch(
        "rank " + std::to_string(r) + " of group " + group.name() +
            " is no more where it was since the membership of epoch " +
            std::to_string(epoch_) + "; reconfigure the group",
        seat, epoch_));
  }
  if (!hasClosed(group)) return nullptr;
  const Closed& closed = closed_.at(group.id());
  if (closed.why == Closing::kAborted)
    return aborted(group, "was aborted by", closed.rank, epoch_);
  return std::make_exception_ptr(
      PeerLost("rank " + std::to_string(closed.rank) + " has left group " +
                   group.name() + ", which cannot go on without it",
               closed.rank, epoch_));
}

// Sequence numbers start again in every epoch, and so do generations. What is
// closed stays so.
void Mesh::startClosedAnew() {
  std::erase_if(closed_, [](const auto& entry) {
    return entry.second.is_open || entry.second.is_replaced;
  });
  for (auto& [id, closed] : closed_) closed.num_generations = 1;
}

Mesh::Closed* Mesh::closeGroup(uint64_t id, uint64_t generation, Closing why,
                               int rank) {
  Closed& closed = closed_[id];
  if (generation < closed.num_generations) return &closed;
  closed = {generation + 1, why, rank, rank == rank_, false, false};
  closing_.push_back(id);
  for (auto& [worker_id, peer] : peers_) sayClosed(*peer, id, closed);
  return &closed;
}

void Mesh::sayClosed(Peer& peer, uint64_t id, const Closed& closed) {
  // Who misses somebody else cannot go on: its own messages will not come.
  const Closing why = closed.is_ours ? closed.why : Closing::kAborted;
  peer.sayClosed(id, closed.num_generations - 1, why);
}

// Not where it is found out: that may be within one of the operations.
void Mesh::endClosed() {
  while (!missing_.empty()) {
    const uint64_t worker_id = missing_.back();
    missing_.pop_back();
    const auto it = peers_.find(worker_id);
    if (it != peers_.end()) endThoseThatMiss(*it->second);
  }
  while (!closing_.empty()) {
    const uint64_t id = closing_.back();
    closing_.pop_back();
    for (Operation* op = flight_; op != nullptr;) {
      Operation* next = op->flight_next_;
      if (op->group->id() == id && hasClosed(*op->group))
        finish(op, refusal(*op->group), false);
      op = next;
    }
    for (auto& [worker_id, peer] : peers_) peer->forget(id);
  }
}

void Mesh::endThoseThatMiss(Peer& peer) {
  for (Operation* op = flight_; op != nullptr; op = op->flight_next_) {
    const Group& group = *op->group;
    const MessageKey key{group.id(), group.generation() << kGenerationShift, 0};
    if (!hasClosed(group) && peer.hasLeft(key) && op->awaits(peer))
      onMissed(peer, key);
  }
}

void Mesh::sendClosed(Peer& peer) {
  for (const auto& [id, closed] : closed_)
    if (!closed.is_replaced) sayClosed(peer, id, closed);
}

void Mesh::onClose(Peer& peer, const MessageKey& key, Closing why) {
  if (why == Closing::kLeft) {
    peer.setLeft(key);
    // Within a step a rank that is done may be seated anew: wait for it.
    if (!absorbs_) missing_.push_back(peer.workerId());
    return;
  }
  closeGroup(key.group, generationOf(key.sequence), Closing::kAborted,
             rankOf(peer.workerId()));
}

void Mesh::onMissed(Peer& peer, const MessageKey& key) {
  if (absorbs_) return;
  closeGroup(key.group, generationOf(key.sequence), Closing::kLeft,
             rankOf(peer.workerId()));
}

}  // namespace mnemosyne::ccl
