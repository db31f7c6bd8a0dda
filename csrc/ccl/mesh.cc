// The mesh's public face, its membership, and what peers and connections tell
// it. How operations run is in progress.cc.
#include "ccl/mesh.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <span>
#include <stdexcept>

#include "common/sha256.h"

namespace mnemosyne::ccl {
namespace {

// How long close() waits for peers to take note. They answer within a
// millisecond unless they are stopped or dead.
constexpr Milliseconds kFarewellTime{1000};
// A worker that is no member may be one of an epoch that we have not heard of.
// Its link waits, unread; so many of them do, or as many as there are members.
constexpr size_t kMaxEarly = 256;

Fd makeEventFd() {
  Fd fd = Fd::make([] { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); });
  if (!fd) throwErrno("eventfd");
  return fd;
}

uint64_t tagOf(const std::string& secret) {
  const std::string what = "tag of a job";
  const Digest digest = hmacSha256(std::as_bytes(std::span(secret)),
                                   std::as_bytes(std::span(what)));
  uint64_t tag;
  std::memcpy(&tag, digest.data(), sizeof(tag));
  return tag;
}

void setEvent(int fd) {
  const uint64_t one = 1;
  (void)!::write(fd, &one, sizeof(one));
}

void clearEvent(int fd) {
  uint64_t count;
  (void)!::read(fd, &count, sizeof(count));
}

}  // namespace

Mesh::Waker::Waker() : fd_(makeEventFd()) {}
void Mesh::Waker::wake() { setEvent(fd_.get()); }
void Mesh::Waker::wait(Deadline deadline) {
  pollfd entry{fd_.get(), POLLIN, 0};
  if (::poll(&entry, 1, deadline.remainingMs()) > 0) clearEvent(fd_.get());
}
void Mesh::Waker::onEvents(uint32_t) { clearEvent(fd_.get()); }

// Runs a function with the engine held; the caller waits for it.
struct Mesh::Command final : Submission {
  explicit Command(std::function<void()> action) : task(std::move(action)) {}
  void run(Mesh&) noexcept override { task(); }

  std::packaged_task<void()> task;
};

Mesh::Mesh(uint64_t worker_id, std::string secret, const std::string& bind_host,
           bool use_shm, Milliseconds patience)
    : worker_id_(worker_id),
      generation_(forkGeneration()),
      job_tag_(tagOf(secret)),
      patience_(patience),
      failure_fd_(makeEventFd()),
      connector_(loop_, *this, worker_id, std::move(secret), bind_host,
                 use_shm),
      callbacks_(std::make_unique<CallbackThreads>()) {
  address_ = connector_.address();
  loop_.watch(waker_.fd(), &waker_);
  thread_ = std::thread([this] { loop(); });
}

Mesh::~Mesh() { close(); }

void Mesh::checkOwner() const {
  if (isInherited())
    throw std::runtime_error(
        "this mesh belongs to the process that this one was forked from");
}

// FNV-1a, with words in place of bytes. Against mistakes, not against malice.
uint64_t Mesh::digestOf(const std::vector<Member>& members) {
  uint64_t digest = 0xcbf29ce484222325;
  for (const Member& member : members)
    digest = (digest ^ member.worker_id) * 0x100000001b3;
  return digest;
}

// ---------------------------------------------------------------- any thread

void Mesh::enqueue(Submission* submission) {
  checkOwner();
  {
    std::lock_guard<std::mutex> lock(submit_mu_);
    if (is_closing_) throw std::runtime_error("the mesh is closed");
    submission->next_ = nullptr;
    (submitted_last_ ? submitted_last_->next_ : submitted_first_) = submission;
    submitted_last_ = submission;
  }
  drive();
}

void Mesh::submit(Operation* op) { enqueue(op); }

void Mesh::perform(std::function<void()> action) {
  Command command(std::move(action));
  auto done = command.task.get_future();
  enqueue(&command);
  // Who holds the engine never waits for anything, so neither does this for
  // long.
  done.get();
}

int Mesh::reconfigure(int64_t epoch, int rank, std::vector<Member> members) {
  int replaced = 0;
  perform([&] { replaced = moveTo(epoch, rank, std::move(members)); });
  return replaced;
}

void Mesh::fence(const std::string& reason, int lost_rank) {
  perform([&] {
    if (epoch_ < 0) return;
    if (lost_rank >= 0) {
      latch(std::make_exception_ptr(PeerLost(reason, lost_rank, epoch_)));
    } else {
      latch(std::make_exception_ptr(StaleEpoch(reason, -1, epoch_)));
    }
  });
}

std::exception_ptr Mesh::failure() const {
  checkOwner();
  std::lock_guard<std::mutex> lock(failure_mu_);
  return failure_;
}

void Mesh::absorb(bool on) {
  perform([&] { absorbs_ = on; });
}

void Mesh::changeSetup(const std::function<void()>& change) {
  perform([&] {
    change();
    if (holds_replay_ || (!recording_ && !replaying_)) {
      setup_ = Setup::kNone;
    } else {
      setup_ = replaying_ ? Setup::kReplayed : Setup::kRecorded;
    }
  });
}

void Mesh::startRecording() {
  changeSetup([&] { recording_.emplace(); });
}

std::string Mesh::stopRecording() {
  std::string text;
  changeSetup([&] {
    if (!recording_) throw std::runtime_error("nothing is being recorded");
    text = recording_->serialize();
    recording_.reset();
  });
  return text;
}

void Mesh::startReplay(const std::string& log) {
  SetupLog parsed = SetupLog::parse(log);
  changeSetup([&] { replaying_ = std::move(parsed); });
}

void Mesh::holdReplay(bool on) {
  changeSetup([&] { holds_replay_ = on; });
}

void Mesh::stopReplay() {
  changeSetup([&] { replaying_.reset(); });
}

std::map<std::string, int64_t> Mesh::counters() const {
  checkOwner();
  return {{"links_open", counters_.links_open},
          {"links_opened", counters_.links_opened},
          {"links_replaced", counters_.links_replaced},
          {"links_shm", counters_.links_shm},
          {"bytes_sent", counters_.bytes_sent},
          {"bytes_received", counters_.bytes_received},
          {"handshakes_refused", counters_.handshakes_refused},
          {"ops", counters_.operations},
          {"ops_absorbed", counters_.absorbed},
          {"failures", counters_.failures}};
}

std::vector<Mesh::Pending> Mesh::pending() {
  std::vector<Pending> all;
  perform([&] {
    for (Operation* op = flight_; op != nullptr; op = op->flight_next_) {
      all.push_back({op, op->kind, op->group->name(), numberOf(op->sequence_),
                     op->numBytes(), op->type_name,
                     op->deadline_.begin(op->timeout), op->timeout,
                     op->awaitedRanks()});
    }
  });
  std::reverse(all.begin(), all.end());
  return all;
}

std::vector<Finished> Mesh::finished() {
  std::vector<Finished> all;
  perform([&] { all = history_.all(); });
  return all;
}

void Mesh::close() {
  checkOwner();
  std::lock_guard<std::mutex> closing(close_mu_);
  if (!thread_.joinable()) return;
  Command command([this] { beginClosing(); });
  try {
    enqueue(&command);
  } catch (const std::runtime_error&) {
    // The progress thread has ended by itself, and said why in failure().
  }
  thread_.join();
  callbacks_.reset();
}

// ---------------------------------------------------------------- membership

// `dials_lost`: whether members whose link broke are dialled anew.
int Mesh::moveTo(int64_t epoch, int rank, std::vector<Member> members,
                 bool dials_lost) {
  if (epoch <= epoch_) {
    throw StaleEpoch("epoch " + std::to_string(epoch) + " is not newer than " +
                         std::to_string(epoch_),
                     -1, epoch_);
  }
  if (rank < 0 || rank >= static_cast<int>(members.size()) ||
      members[rank].worker_id != worker_id_) {
    throw ConfigError("rank " + std::to_string(rank) +
                      " of the membership is not this worker");
  }
  for (const Member& member : members) Address::parse(member.address);
  abortAll(std::make_exception_ptr(
      StaleEpoch("cancelled: the job moves from epoch " +
                     std::to_string(epoch_) + " to " + std::to_string(epoch),
                 -1, epoch_)));

  // Which ranks were reached over a link that does not serve any more? Not
  // those whose workers have only changed places.
  std::unordered_map<uint64_t, int> rank_of;
  for (size_t r = 0; r < members.size(); ++r)
    rank_of[members[r].worker_id] = static_cast<int>(r);
  std::vector<int> replaced;
  for (size_t r = 0; r < members_.size(); ++r) {
    const uint64_t old_id = members_[r].worker_id;
    if (rank_of.count(old_id) == 0) connector_.forget(old_id);
    const auto it = peers_.find(old_id);
    if (it == peers_.end() || it->second->linkedAt() < 0) continue;
    const auto now = rank_of.find(old_id);
    if (now != rank_of.end()) {
      if (dials_lost && broken_.count(old_id)) replaced.push_back(now->second);
    } else if (r < members.size() && members[r].worker_id != worker_id_) {
      replaced.push_back(static_cast<int>(r));
    }
  }

  stampSeats(members, epoch);
  epoch_ = epoch;
  rank_ = rank;
  members_ = std::move(members);
  members_digest_ = digestOf(members_);
  ranks_ = std::move(rank_of);
  public_epoch_ = epoch_;
  public_rank_ = rank_;
  public_size_ = static_cast<int>(members_.size());
  broken_.clear();
  begun_.clear();
  gave_up_.clear();
  startClosedAnew();
  closing_.clear();
  missing_.clear();
  setFailure(nullptr);

  std::set<uint64_t> ids;
  for (const Member& member : members_) ids.insert(member.worker_id);
  closePeersWithout(ids);
  for (auto& [id, peer] : peers_) {
    if (dials_lost) peer->is_excused = false;  // a membership of somebody's
    peer->fence();
    sendClosed(*peer);
    onWork(*peer);  // what a peer that is ahead has sent can be read now
  }
  for (int r : replaced) dialIfNeeded(r);
  counters_.links_replaced += static_cast<int64_t>(replaced.size());
  // Who is no member has been told of, once: what it claims may be far ahead.
  for (auto& [id, peer] : peers_)
    if (rankOf(id) >= 0) onMarker(*peer);
  return static_cast<int>(replaced.size());
}

// Drops peers that are not members, and what is left of broken links.
void Mesh::closePeersWithout(const std::set<uint64_t>& ids) {
  for (auto it = peers_.begin(); it != peers_.end();) {
    Peer& peer = *it->second;
    const bool is_member = ids.count(it->first) > 0;
    // It may be seated in an epoch that we have not heard of.
    const bool is_early = !is_member && peer.state() == Peer::State::kOpen &&
                          peer.epoch() > epoch_;
    const bool is_broken =
        peer.state() == Peer::State::kGone && !peer.hasDeparted();
    if (is_early || (is_member && !is_broken)) {
      ++it;
      continue;
    }
    if (!is_member) connector_.forget(it->first);
    bury(std::move(it->second));
    it = peers_.erase(it);
  }
}

void Mesh::bury(std::unique_ptr<Peer> peer) {
  peer->discard();
  std::erase(listed_, peer.get());
  std::replace(pumping_.begin(), pumping_.end(), peer.get(),
               static_cast<Peer*>(nullptr));
  loop_.bury(std::move(peer));
}

Peer& Mesh::peerOf(uint64_t worker_id) {
  auto& peer = peers_[worker_id];
  if (!peer)
    peer = std::make_unique<Peer>(static_cast<Peer::Host&>(*this), worker_id);
  return *peer;
}

Peer& Mesh::peerOf(Operation& op, int group_rank) {
  Peer*& cached = op.group->peer(group_rank);
  if (cached == nullptr) {
    const int rank = op.group->globalRank(group_rank);
    if (rank >= static_cast<int>(members_.size()))
      throw std::runtime_error("rank " + std::to_string(rank) +
                               " is not in the membership");
    cached = &peerOf(members_[rank].worker_id);
    dialIfNeeded(rank);
  }
  return *cached;
}

void Mesh::dialIfNeeded(int rank) {
  const Member& member = members_[rank];
  if (peerOf(member.worker_id).state() == Peer::State::kUnlinked &&
      !connector_.isDialling(member.worker_id)) {
    connector_.dial(member.worker_id, member.address);
  }
}

int Mesh::rankOf(uint64_t worker_id) const {
  const auto it = ranks_.find(worker_id);
  return it == ranks_.end() ? -1 : it->second;
}

void Mesh::beginClosing() {
  {
    std::lock_guard<std::mutex> lock(submit_mu_);
    is_closing_ = true;
  }
  absorbs_ = false;
  connector_.cancelAll();
  latch(std::make_exception_ptr(
      StaleEpoch("cancelled: the mesh is being closed", -1, epoch_)));
  abortAll(failure_);
  for (auto& [id, peer] : peers_) peer->sayFarewell();
  close_by_ = Deadline::in(kFarewellTime);
}

bool Mesh::isClosed() const {
  return std::none_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    return entry.second->state() == Peer::State::kOpen;
  });
}

// ---------------------------------------------------------------- failures

void Mesh::latch(std::exception_ptr error) {
  if (has_failed_) return;
  must_abort_ = true;  // not here: this may be called from within an operation
  ++counters_.failures;
  setFailure(std::move(error));
}

void Mesh::setFailure(std::exception_ptr error) {
  // Whoever sees the flag finds the failure.
  const bool has_failed = error != nullptr;
  if (!has_failed) has_failed_ = must_abort_ = false;
  {
    std::lock_guard<std::mutex> lock(failure_mu_);
    failure_ = std::move(error);
  }
  has_failed_ = has_failed;
  has_failed_ ? setEvent(failure_fd_.get()) : clearEvent(failure_fd_.get());
}

void Mesh::onLost(Peer& peer, const std::string& why) {
  const int rank = rankOf(peer.workerId());
  if (peer.state() == Peer::State::kGone && peer.linkedAt() >= 0 &&
      !peer.hasDeparted()) {
    broken_.insert(peer.workerId());
  }
  if (rank < 0) return;  // of an epoch that is not ours
  latch(std::make_exception_ptr(
      PeerLost("lost peer rank=" + std::to_string(rank) +
                   " epoch=" + std::to_string(epoch_) + ": " + why,
               rank, epoch_)));
}

void Mesh::onMismatch(Peer& peer, const std::string& what) {
  const int rank = rankOf(peer.workerId());
  latch(std::make_exception_ptr(CollectiveMismatch(
      "rank " + std::to_string(rank_) + " and rank " + std::to_string(rank) +
          " disagree on an operation: seen from rank " + std::to_string(rank_) +
          ", " + what,
      rank, epoch_)));
}

void Mesh::onMarker(Peer& peer) {
  if (epoch_ < 0 || peer.epoch() < epoch_) return;
  const int rank = rankOf(peer.workerId());
  if (peer.epoch() > epoch_) {
    latch(std::make_exception_ptr(
        StaleEpoch("epoch " + std::to_string(epoch_) + " is over: rank " +
                       std::to_string(rank) + " is in epoch " +
                       std::to_string(peer.epoch()),
                   rank, epoch_)));
  } else if (rank >= 0 && peer.membersDigest() != members_digest_) {
    latch(std::make_exception_ptr(CollectiveMismatch(
        "rank " + std::to_string(rank_) + " and rank " + std::to_string(rank) +
            " disagree on the members of epoch " + std::to_string(epoch_) +
            ": give an epoch's number to one membership only",
        rank, epoch_)));
  }
}

// ---------------------------------------------------------------- connections

Verdict Mesh::admits(uint64_t worker_id, int64_t its_epoch,
                     bool has_lost_link) {
  if (close_by_ < Deadline::never()) return Verdict::kNotAMember;
  const auto decide = [](bool is_let_in) {
    return is_let_in ? Verdict::kAccepted : Verdict::kDuplicate;
  };
  const auto it = peers_.find(worker_id);
  if (it != peers_.end() && it->second->state() == Peer::State::kOpen) {
    // Our end is dead without our having noticed; or its dial crossed ours, in
    // the same epoch.
    return decide(has_lost_link || its_epoch > it->second->linkedAt());
  }
  if (connector_.isDialling(worker_id)) return decide(worker_id < worker_id_);
  return rankOf(worker_id) >= 0 || makeRoomForEarly(its_epoch)
             ? Verdict::kAccepted
             : Verdict::kNotAMember;
}

// Of too many the one gives way that claims to be farthest ahead: it is the
// least likely to be a member soon.
bool Mesh::makeRoomForEarly(int64_t its_epoch) {
  if (its_epoch <= epoch_) return false;
  size_t count = 0;
  auto farthest = peers_.end();
  for (auto it = peers_.begin(); it != peers_.end(); ++it) {
    if (rankOf(it->first) >= 0) continue;
    ++count;
    if (farthest == peers_.end() ||
        it->second->epoch() > farthest->second->epoch())
      farthest = it;
  }
  if (count < std::max(kMaxEarly, members_.size())) return true;
  if (farthest->second->epoch() <= its_epoch) return false;
  connector_.forget(farthest->first);
  bury(std::move(farthest->second));
  peers_.erase(farthest);
  return true;
}

void Mesh::onLinked(const Handshake& handshake, std::unique_ptr<Link> link) {
  Peer& peer = peerOf(handshake.peerId());
  if (peer.state() == Peer::State::kOpen && !peer.letGo())
    peer.drop("it has made a new link");
  loop_.hand(link->fd(), &peer);
  ++counters_.links_open;
  ++counters_.links_opened;
  if (link->kind() == std::string("shm")) {
    ++counters_.links_shm;
  } else {
    ask_hosts_at_ = std::min(ask_hosts_at_, Deadline::in(patience_ / 5));
  }
  peer.attach(std::move(link), handshake.peerStanding(),
              handshake.ownStanding());
  sendClosed(peer);
}

// The other side may not know, or not live: to dial is to find out.
void Mesh::onUnlinked(Peer& peer) {
  const int rank = rankOf(peer.workerId());
  if (rank < 0) return;
  ++counters_.links_replaced;
  dialIfNeeded(rank);
}

void Mesh::onClosing(int fd) {
  loop_.forget(fd);
  --counters_.links_open;
}

void Mesh::onDialFailed(uint64_t worker_id, const std::string& why) {
  peerOf(worker_id).drop(why);
}

}  // namespace mnemosyne::ccl
