// c10d's verbs of repair: abort, shutdown, shrink, reconfigure. What they mean
// here is in docs/design.md, "Verbs".
#include <algorithm>
#include <set>
#include <utility>

#include "ccl/backend.h"
#include "ccl/handle.h"

namespace mnemosyne::ccl {
namespace {

constexpr int kShrinkAbort = 1;  // c10d's SHRINK_ABORT

// A member's loss is the group's business; anything else is behind the epoch
// that the others have moved to.
bool isBehind(const Error& error, const Group& group) {
  if (dynamic_cast<const StaleEpoch*>(&error) != nullptr) return true;
  if (dynamic_cast<const PeerLost*>(&error) == nullptr) return false;
  const auto& ranks = group.globalRanks();
  return std::find(ranks.begin(), ranks.end(), error.rank()) == ranks.end();
}

// Another number for each n, and the same on all ranks.
int64_t nthOf(int64_t uuid, int64_t n) {
  const auto mixed =
      (static_cast<uint64_t>(uuid) ^ (n + 1)) * 0x9e3779b97f4a7c15;
  return static_cast<int64_t>(mixed ^ mixed >> 32);
}

std::vector<Handle> parseAll(const ReconfigureOptions& opts) {
  std::vector<Handle> handles;
  std::visit(
      [&](const auto& texts) {
        for (const std::string& text : texts)
          handles.push_back(Handle::parse(text));
      },
      opts.handles);
  // In a set they have no order: the workers' age is one that all agree on.
  if (opts.handles.index() == 0) {
    std::sort(handles.begin(), handles.end(), [](const auto& a, const auto& b) {
      return a.worker_id < b.worker_id;
    });
  }
  std::set<uint64_t> ids;
  for (const Handle& handle : handles)
    if (!ids.insert(handle.worker_id).second)
      throw ConfigError("worker " + std::to_string(handle.worker_id) +
                        " is named twice in one group");
  return handles;
}

// This worker's place among the handles.
int findSelf(const std::vector<Handle>& handles, const Mesh& mesh) {
  int place = -1;
  for (size_t i = 0; i < handles.size(); ++i) {
    const Handle& handle = handles[i];
    if (handle.job_tag != mesh.jobTag())
      throw ConfigError("the handle of worker " +
                        std::to_string(handle.worker_id) +
                        " is of another job");
    if (handle.worker_id == mesh.workerId()) place = static_cast<int>(i);
  }
  if (place < 0)
    throw ConfigError("worker " + std::to_string(mesh.workerId()) +
                      " is not in the group that it is to be in");
  const int64_t epoch = handles[place].epoch;
  if (epoch != mesh.currentEpoch())
    throw StaleEpoch("this worker's handle is of epoch " +
                         std::to_string(epoch) + ", and it is in epoch " +
                         std::to_string(mesh.currentEpoch()) +
                         "; exchange handles again",
                     place, epoch);
  return place;
}

}  // namespace

c10d::ErrorType MnemosyneBackend::getError() {
  std::exception_ptr error = mesh_->failure();
  if (!error) error = mesh_->failureOf(*group());
  if (!error) return c10d::ErrorType::SUCCESS;
  try {
    std::rethrow_exception(error);
  } catch (const CollectiveTimeout&) {
    return c10d::ErrorType::TIMEOUT;
  } catch (...) {
    return c10d::ErrorType::COMM_ERROR;
  }
}

void MnemosyneBackend::abort() { mesh_->abort(*group()); }

void MnemosyneBackend::shutdown() { mesh_->leave(*group()); }

// ---------------------------------------------------------------- shrink

c10::intrusive_ptr<c10d::Backend> MnemosyneBackend::shrink(
    const std::vector<int64_t>& ranks_to_exclude, int shrink_flags,
    const c10::intrusive_ptr<Options>& opts_override) {
  std::lock_guard<std::mutex> lock(verbs_mu_);
  const std::shared_ptr<Group> parent = group();
  const std::set<int64_t> excluded(ranks_to_exclude.begin(),
                                   ranks_to_exclude.end());
  for (int64_t rank : excluded) {
    if (rank < 0 || rank >= parent->size())
      throw ConfigError("rank " + std::to_string(rank) +
                        " cannot be excluded from a group of " +
                        std::to_string(parent->size()));
  }
  if (excluded.empty() || excluded.size() != ranks_to_exclude.size())
    throw ConfigError("ranks to exclude must be given, and each of them once");
  if (excluded.count(parent->rank()))
    throw ConfigError("rank " + std::to_string(parent->rank()) +
                      " is excluded, and must not shrink the group");
  const Mesh::Membership now = mesh_->membership();
  std::vector<int> ranks;
  std::vector<uint64_t> expected;
  for (int r = 0; r < parent->size(); ++r) {
    const int seat = parent->globalRank(r);
    if (!excluded.count(r))
      ranks.push_back(seat);
    else if (seat < static_cast<int>(now.members.size()))
      expected.push_back(now.members[seat].worker_id);
  }

  if (shrink_flags & kShrinkAbort) mesh_->abort(*parent);
  if (!mesh_->isLocked()) mesh_->excuse(expected);
  const Milliseconds timeout =
      opts_override ? opts_override->timeout : timeout_.load();
  auto small = std::make_shared<Group>(
      parent->name() + ":shrunk", std::move(ranks), now.rank, timeout,
      parent->canAbsorb(), nthOf(parent->uuid(), num_shrinks_++));
  mesh_->adopt(*small);
  auto backend = another(std::move(small), is_world_);
  backend->join(timeout, true);
  return backend;
}

// Waits until all members of a new group have it. `follows`: past failures of
// others, and to the epoch that members are in already.
MnemosyneBackend::WorkPtr MnemosyneBackend::join(Milliseconds timeout,
                                                 bool follows) {
  const Deadline deadline = Deadline::in(timeout);
  if (follows && mesh_->failure()) mesh_->advance();
  while (true) {
    c10d::BarrierOptions opts;
    opts.timeout = Milliseconds(std::max(1, deadline.remainingMs()));
    try {
      const WorkPtr work = barrier(opts);
      work->wait();
      return work;
    } catch (const Error& error) {
      const bool may_follow = follows && !deadline.expired() &&
                              isBehind(error, *group()) && mesh_->advance();
      if (may_follow) continue;
      // So that the others do not wait for this one.
      mesh_->abort(*group());
      throw;
    }
  }
}

// ---------------------------------------------------------------- reconfigure

ReconfigureHandle MnemosyneBackend::get_reconfigure_handle() const {
  const Mesh::Membership now = mesh_->membership();
  return Handle{mesh_->jobTag(), mesh_->workerId(), now.epoch, mesh_->address()}
      .toString();
}

c10::intrusive_ptr<c10d::Work> MnemosyneBackend::reconfigure(
    const ReconfigureOptions& opts) {
  std::lock_guard<std::mutex> lock(verbs_mu_);
  const std::vector<Handle> handles = parseAll(opts);
  const int place = findSelf(handles, *mesh_);
  if (uuids_.count(opts.uuid))
    throw ConfigError("uuid " + std::to_string(opts.uuid) +
                      " was already used; each reconfigure needs a new one");
  const Milliseconds timeout = opts.timeout.value_or(timeout_.load());
  const std::vector<int> ranks =
      is_world_ ? moveMesh(handles, place) : seatsOf(handles);
  uuids_.insert(opts.uuid);
  takeSeats(ranks, opts.uuid);
  return join(timeout, !is_world_);
}

// The group of all: its members are those of the mesh. All of them come to the
// same epoch without having asked each other.
std::vector<int> MnemosyneBackend::moveMesh(const std::vector<Handle>& handles,
                                            int place) {
  if (mesh_->isLocked())
    throw ConfigError(
        "the membership of this job is its manager's: the default group "
        "cannot be reconfigured");
  int64_t epoch = -1;
  std::vector<Mesh::Member> members;
  std::vector<int> ranks;
  for (const Handle& handle : handles) {
    epoch = std::max(epoch, handle.epoch);
    ranks.push_back(static_cast<int>(members.size()));
    members.push_back({handle.worker_id, handle.address});
  }
  mesh_->reconfigure(epoch + 1, place, std::move(members));
  return ranks;
}

std::vector<int> MnemosyneBackend::seatsOf(
    const std::vector<Handle>& handles) const {
  const Mesh::Membership now = mesh_->membership();
  std::vector<int> ranks;
  for (const Handle& handle : handles) {
    const auto it =
        std::find_if(now.members.begin(), now.members.end(),
                     [&](const Mesh::Member& member) {
                       return member.worker_id == handle.worker_id &&
                              member.address == handle.address;
                     });
    if (it == now.members.end())
      throw StaleEpoch("worker " + std::to_string(handle.worker_id) +
                           " is not in the membership of epoch " +
                           std::to_string(now.epoch) +
                           "; reconfigure the default group first",
                       -1, now.epoch);
    ranks.push_back(static_cast<int>(it - now.members.begin()));
  }
  return ranks;
}

void MnemosyneBackend::reseat(std::vector<int> global_ranks) {
  std::lock_guard<std::mutex> lock(verbs_mu_);
  takeSeats(std::move(global_ranks), group()->uuid());
}

void MnemosyneBackend::takeSeats(std::vector<int> global_ranks, int64_t uuid) {
  const std::shared_ptr<Group> former = group();
  auto next = std::make_shared<Group>(former->name(), std::move(global_ranks),
                                      mesh_->rank(), timeout_.load(),
                                      former->canAbsorb(), uuid);
  mesh_->replace(*former, *next);
  // Constant before torch 2.14, which has reconfigure itself; no object is made
  // constant, and all access is in functions that are compiled elsewhere.
  const_cast<int&>(rank_) = next->rank();
  const_cast<int&>(size_) = next->size();
  next_number_ = 0;
  std::lock_guard<std::mutex> lock(group_mu_);
  group_ = std::move(next);
}

}  // namespace mnemosyne::ccl
