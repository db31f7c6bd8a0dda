#include "ccl/group.h"

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "common/sha256.h"

namespace mnemosyne::ccl {
namespace {

int indexOf(const std::vector<int>& ranks, int global_rank) {
  const auto it = std::find(ranks.begin(), ranks.end(), global_rank);
  if (it == ranks.end())
    throw ConfigError("rank " + std::to_string(global_rank) +
                      " is not in the group that it makes");
  return static_cast<int>(it - ranks.begin());
}

uint64_t idOf(const std::string& name, const std::vector<int>& ranks,
              int64_t uuid) {
  const Digest digest = Sha256()
                            .update(std::as_bytes(std::span(name)))
                            .update(std::as_bytes(std::span(ranks)))
                            .update(std::as_bytes(std::span(&uuid, 1)))
                            .finish();
  uint64_t id;
  std::memcpy(&id, digest.data(), sizeof(id));
  return id;
}

}  // namespace

Group::Group(std::string name, std::vector<int> global_ranks, int global_rank,
             Milliseconds timeout, bool absorb, int64_t uuid)
    : name_(std::move(name)),
      global_ranks_(std::move(global_ranks)),
      rank_(indexOf(global_ranks_, global_rank)),
      timeout_(timeout),
      can_absorb_(absorb),
      uuid_(uuid),
      id_(idOf(name_, global_ranks_, uuid_)) {}

void Group::enter(int64_t epoch) {
  if (epoch_ == epoch) return;
  epoch_ = epoch;
  setGeneration(0);
  peers_.assign(global_ranks_.size(), nullptr);
}

void Group::setGeneration(uint64_t generation) {
  generation_ = generation;
  next_sequence_ = first();
  sent_.clear();
  received_.clear();
}

}  // namespace mnemosyne::ccl
