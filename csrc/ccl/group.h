// A process group: an ordered set of ranks, seen as a view of the mesh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ccl/frame.h"
#include "common/deadline.h"

namespace mnemosyne::ccl {

class Peer;

class Group {
 public:
  // `absorb`: whether its failures may be absorbed, and its operations recorded
  // and replayed; not so for the groups that recovery itself uses. `uuid`:
  // tells the instances of a group that is reconfigured apart.
  Group(std::string name, std::vector<int> global_ranks, int global_rank,
        Milliseconds timeout, bool absorb, int64_t uuid = -1);

  const std::string& name() const { return name_; }
  int64_t uuid() const { return uuid_; }
  uint64_t id() const { return id_; }
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(global_ranks_.size()); }
  int globalRank(int rank) const { return global_ranks_[rank]; }
  const std::vector<int>& globalRanks() const { return global_ranks_; }
  Milliseconds timeout() const { return timeout_; }
  bool canAbsorb() const { return can_absorb_; }

  // ---- progress thread only: all of this starts again in every epoch
  void enter(int64_t epoch);
  bool isIn(int64_t epoch) const { return epoch_ == epoch; }
  uint64_t nextSequence() { return next_sequence_++; }
  // Numbers of the messages to and from a rank under a tag.
  uint64_t& nextSend(int rank, uint64_t tag) {
    return sent_.try_emplace({rank, tag}, first()).first->second;
  }
  uint64_t& nextRecv(int rank, uint64_t tag) {
    return received_.try_emplace({rank, tag}, first()).first->second;
  }
  Peer*& peer(int rank) { return peers_[rank]; }
  // Of the first sequence number in this epoch.
  uint64_t generation() const { return generation_; }
  void setGeneration(uint64_t generation);

  // The epochs since which each of its seats has had the worker that this group
  // means, or one in its place. Empty: the mesh has not seen the group yet.
  std::vector<int64_t> seated_since;
  size_t num_in_flight = 0;
  bool is_leaving = false;  // takes no new operations

 private:
  uint64_t first() const { return generation_ << kGenerationShift; }

  const std::string name_;
  const std::vector<int> global_ranks_;
  const int rank_;
  const Milliseconds timeout_;
  const bool can_absorb_;
  const int64_t uuid_;
  const uint64_t id_;

  int64_t epoch_ = -1;
  uint64_t generation_ = 0;
  uint64_t next_sequence_ = 0;
  std::map<std::pair<int, uint64_t>, uint64_t> sent_;
  std::map<std::pair<int, uint64_t>, uint64_t> received_;
  std::vector<Peer*> peers_;
};

}  // namespace mnemosyne::ccl
