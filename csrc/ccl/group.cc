#include "ccl/group.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/sha256.h"

namespace mnemosyne::ccl {
namespace {

int indexOf(const std::vector<int>& ranks, int global_rank) {
  const auto it = std::find(ranks.begin(), ranks.end(), global_rank);
  if (it == ranks.end())
    throw std::invalid_argument("rank " + std::to_string(global_rank) +
                                " is not in the group that it makes");
  return static_cast<int>(it - ranks.begin());
}

uint64_t idOf(const std::string& name, const std::vector<int>& ranks) {
  const Digest digest = Sha256()
                            .update(std::as_bytes(std::span(name)))
                            .update(std::as_bytes(std::span(ranks)))
                            .finish();
  uint64_t id;
  std::memcpy(&id, digest.data(), sizeof(id));
  return id;
}

}  // namespace

Group::Group(std::string name, std::vector<int> global_ranks, int global_rank,
             Milliseconds timeout, bool absorb)
    : name_(std::move(name)),
      global_ranks_(std::move(global_ranks)),
      rank_(indexOf(global_ranks_, global_rank)),
      timeout_(timeout),
      can_absorb_(absorb),
      id_(idOf(name_, global_ranks_)) {}

void Group::enter(int64_t epoch) {
  if (epoch_ == epoch) return;
  epoch_ = epoch;
  next_sequence_ = 0;
  sent_.clear();
  received_.clear();
  peers_.assign(global_ranks_.size(), nullptr);
}

}  // namespace mnemosyne::ccl
