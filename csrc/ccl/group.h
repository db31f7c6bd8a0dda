// A process group: an ordered set of ranks, seen as a view of the mesh.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/deadline.h"

namespace mnemosyne::ccl {

class Peer;

class Group {
 public:
  // `absorb`: whether its failures may be absorbed, and its operations recorded
  // and replayed; not so for the groups that recovery itself uses.
  Group(std::string name, std::vector<int> global_ranks, int global_rank,
        Milliseconds timeout, bool absorb);

  const std::string& name() const { return name_; }
  uint64_t id() const { return id_; }
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(global_ranks_.size()); }
  int globalRank(int rank) const { return global_ranks_[rank]; }
  Milliseconds timeout() const { return timeout_; }
  bool canAbsorb() const { return can_absorb_; }

  // ---- progress thread only: all of this starts again in every epoch
  void enter(int64_t epoch);
  uint64_t nextSequence() { return next_sequence_++; }
  // Numbers of the messages to and from a rank under a tag.
  uint64_t& nextSend(int rank, uint64_t tag) { return sent_[{rank, tag}]; }
  uint64_t& nextRecv(int rank, uint64_t tag) { return received_[{rank, tag}]; }
  Peer*& peer(int rank) { return peers_[rank]; }

 private:
  const std::string name_;
  const std::vector<int> global_ranks_;
  const int rank_;
  const Milliseconds timeout_;
  const bool can_absorb_;
  const uint64_t id_;

  int64_t epoch_ = -1;
  uint64_t next_sequence_ = 0;
  std::map<std::pair<int, uint64_t>, uint64_t> sent_;
  std::map<std::pair<int, uint64_t>, uint64_t> received_;
  std::vector<Peer*> peers_;
};

}  // namespace mnemosyne::ccl
