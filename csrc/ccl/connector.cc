#include "ccl/connector.h"

#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "common/error.h"

namespace mnemosyne::ccl {
namespace {

// An honest handshake takes a millisecond; a stopped peer's kernel still
// accepts.
constexpr Milliseconds kAnswerTime{10'000};
constexpr Milliseconds kDialTime{30'000};
// Who connects and says nothing holds a place, and so a descriptor. All places
// together take at most a quarter of what this process may have: links, the
// script's files and our own dials need the rest.
constexpr size_t kMaxAnswers = 1024;
constexpr rlim_t kShareOfDescriptors = 4;
// With no place left, whoever has had one for so long without an end gives it
// to the next in the queue. Not earlier: more workers of a large job may dial
// at one moment than there are places.
constexpr Milliseconds kPlaceTime{1'000};
// The peer may have dropped us for that reason: try again, but not for ever,
// since it also closes when our secret is wrong.
constexpr int kMaxAttempts = 5;
constexpr Milliseconds kRetryPause{20};

std::string hex(const void* data, size_t size) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    const auto byte = static_cast<const uint8_t*>(data)[i];
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// Abstract sockets belong to a network namespace, so two containers on one
// machine are two hosts.
std::string hostId() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char name[256] = {};
  ::gethostname(name, sizeof(name) - 1);
  struct stat status{};
  ::stat("/proc/self/ns/net", &status);
  const std::string all =
      boot + "/" + name + "/" + std::to_string(status.st_ino);
  const Digest digest = sha256(std::as_bytes(std::span(all)));
  return hex(digest.data(), 8);
}

// Descriptors and memory may be free again a moment later: a handshake that we
// answer holds some.
bool mayPass(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS ||
         error == ENOMEM;
}

// Asked for each time: the script may change it.
size_t numPlaces() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return kMaxAnswers;
  return std::clamp<rlim_t>(limit.rlim_cur / kShareOfDescriptors, 1,
                            kMaxAnswers);
}

std::string randomName() {
  std::array<std::byte, 12> bytes;
  if (::getrandom(bytes.data(), bytes.size(), 0) !=
      static_cast<ssize_t>(bytes.size())) {
    throwErrno("getrandom");
  }
  return "mnemosyne-" + hex(bytes.data(), bytes.size());
}

// Why a dial has failed.
std::string reasonOf(const Handshake* handshake, const std::string& error) {
  if (!error.empty()) return "no connection to it can be made: " + error;
  const auto state = handshake ? handshake->state() : Handshake::State::kBusy;
  if (state == Handshake::State::kUnreachable)
    return "nobody listens at its address";
  if (state != Handshake::State::kNotAMember)
    return "it does not complete the handshake";
  const Standing& theirs = handshake->peerStanding();
  const Standing& ours = handshake->ownStanding();
  if (theirs.epoch == ours.epoch && theirs.members != ours.members)
    return "for it epoch " + std::to_string(ours.epoch) +
           " has other members, and this worker is none";
  return "it does not take this worker for a member, or is leaving";
}

}  // namespace

std::string Address::toString() const {
  return host_id + "|" + unix_name + "|" + tcp.host + "|" +
         std::to_string(tcp.port);
}

Address Address::parse(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, '|');)
    parts.push_back(part);
  char* end = nullptr;
  const unsigned long port =
      parts.size() == 4 ? std::strtoul(parts[3].c_str(), &end, 10) : 0;
  if (port == 0 || port > 65535 || *end != '\0')
    throw std::invalid_argument("not the address of a worker: '" + text + "'");
  return {parts[0], parts[1], {parts[2], static_cast<uint16_t>(port)}};
}

Connector::Connector(EventLoop& loop, Host& host, uint64_t worker_id,
                     std::string secret, const std::string& bind_host,
                     bool use_shm)
    : loop_(loop), host_(host), self_{worker_id, std::move(secret)} {
  address_.host_id = hostId();
  tcp_ = std::make_unique<Listener>(*this, listenTcp(bind_host, &address_.tcp),
                                    false);
  loop_.watch(tcp_->fd(), tcp_.get());
  if (!use_shm) return;
  address_.unix_name = randomName();
  unix_ =
      std::make_unique<Listener>(*this, listenUnix(address_.unix_name), true);
  loop_.watch(unix_->fd(), unix_.get());
}

void Connector::acceptAll(int listener, bool is_shm) {
  const size_t num_places = numPlaces();
  const auto hasRoom = [&] {
    return answers_.size() < num_places ||
           answers_.front()->deadline().remainingMs() <=
               (kAnswerTime - kPlaceTime).count();
  };
  while (hasRoom()) {
    Fd socket = acceptOne(listener);
    if (!socket) {
      if (!wouldBlock()) accept_at_ = Deadline::in(kRetryPause);
      return;
    }
    answers_.push_back(Handshake::answer(
        self_, std::move(socket), is_shm, [this] { return host_.standing(); },
        [this](const Hello& hello) {
          const bool has_lost_link =
              hello.former_link != 0 &&
              hello.former_link == lastLinkTo(hello.worker_id);
          return host_.admits(hello.worker_id, hello.at.epoch, has_lost_link);
        },
        Deadline::in(kAnswerTime)));
    Handshake* handshake = answers_.back().get();
    loop_.watch(handshake->fd(), handshake);
    if (answers_.size() <= num_places) continue;
    bury(std::move(answers_.front()));
    answers_.pop_front();
    host_.onRefused();
  }
  accept_at_ = Deadline::in(kRetryPause);
}

void Connector::dial(uint64_t worker_id, const std::string& address) {
  Dial dial{Address::parse(address),
            Deadline::in(kDialTime),
            Deadline::never(),
            0,
            false,
            {},
            nullptr};
  attempt(worker_id,
          &dials_.insert_or_assign(worker_id, std::move(dial)).first->second);
}

void Connector::bury(std::unique_ptr<Handshake> handshake) {
  if (!handshake) return;
  loop_.forget(handshake->fd());
  loop_.bury(std::move(handshake));
}

void Connector::cancel(uint64_t worker_id) {
  const auto it = dials_.find(worker_id);
  if (it == dials_.end()) return;
  bury(std::move(it->second.handshake));
  dials_.erase(it);
}

void Connector::cancelAll() {
  for (auto& [worker_id, dial] : dials_) bury(std::move(dial.handshake));
  dials_.clear();
}

void Connector::forget(uint64_t worker_id) {
  cancel(worker_id);
  link_ids_.erase(worker_id);
}

uint64_t Connector::lastLinkTo(uint64_t worker_id) const {
  const auto it = link_ids_.find(worker_id);
  return it == link_ids_.end() ? 0 : it->second;
}

void Connector::attempt(uint64_t worker_id, Dial* dial) {
  const bool is_shm = !dial->without_shm && !address_.unix_name.empty() &&
                      !dial->address.unix_name.empty() &&
                      dial->address.host_id == address_.host_id;
  ++dial->attempts;
  Fd socket;
  try {
    socket = is_shm ? connectUnix(dial->address.unix_name)
                    : connectTcp(dial->address.tcp);
  } catch (const std::invalid_argument&) {
    errno = EINVAL;  // not an address that this host can use
  }
  if (socket) {
    dial->error.clear();
    dial->handshake = Handshake::dial(self_, std::move(socket), is_shm,
                                      worker_id, host_.standing(),
                                      lastLinkTo(worker_id), dial->deadline);
    loop_.watch(dial->handshake->fd(), dial->handshake.get());
    dial->retry_at = Deadline::never();
    return;
  }
  const int error = errno;
  dial->error = std::strerror(error);
  if (error == EAGAIN) {
    // A Unix listener whose queue is full, which is no fault: a busy machine
    // may let it wait for longer than all attempts take.
    --dial->attempts;
  } else if (!mayPass(error)) {
    dial->attempts = kMaxAttempts;
  }
  dial->retry_at = Deadline::in(kRetryPause);
}

void Connector::settle() {
  if (accept_at_.expired()) {
    accept_at_ = Deadline::never();
    acceptAll(tcp_->fd(), false);
    if (unix_) acceptAll(unix_->fd(), true);
  }
  settleAnswers();
  settleDials();
}

void Connector::settleAnswers() {
  for (auto it = answers_.begin(); it != answers_.end();) {
    Handshake& handshake = **it;
    const auto state = handshake.state();
    if (state == Handshake::State::kBusy && !handshake.deadline().expired()) {
      ++it;
      continue;
    }
    if (state == Handshake::State::kLinked) {
      // The peer may be dialled by us too, and lose: it has accepted our
      // verdict.
      cancel(handshake.peerId());
      link_ids_[handshake.peerId()] = handshake.linkId();
      host_.onLinked(handshake, handshake.takeLink());
    } else if (state == Handshake::State::kRefused ||
               state == Handshake::State::kNotAMember ||
               state == Handshake::State::kBusy) {
      host_.onRefused();
    }
    bury(std::move(*it));
    it = answers_.erase(it);
  }
}

void Connector::settleDials() {
  for (auto it = dials_.begin(); it != dials_.end();) {
    const uint64_t worker_id = it->first;
    Dial& dial = it->second;
    const auto state =
        dial.handshake ? dial.handshake->state() : Handshake::State::kBusy;
    if (state == Handshake::State::kLinked) {
      auto handshake = std::move(dial.handshake);
      it = dials_.erase(it);
      link_ids_[worker_id] = handshake->linkId();
      host_.onLinked(*handshake, handshake->takeLink());
      bury(std::move(handshake));
      continue;
    }
    const bool is_final =
        state == Handshake::State::kUnreachable ||
        state == Handshake::State::kRefused ||
        state == Handshake::State::kNotAMember || dial.deadline.expired() ||
        (dial.attempts >= kMaxAttempts &&
         (state == Handshake::State::kClosed || dial.retry_at.expired()));
    if (is_final) {
      const std::string why = reasonOf(dial.handshake.get(), dial.error);
      bury(std::move(dial.handshake));
      it = dials_.erase(it);
      host_.onDialFailed(worker_id, why);
      continue;
    }
    if (state == Handshake::State::kClosed ||
        state == Handshake::State::kNoMemory ||
        state == Handshake::State::kDuplicate) {
      // Either side may lack memory to share, or a descriptor for it: the
      // connection itself can carry what the memory would.
      dial.without_shm |= state == Handshake::State::kNoMemory ||
                          (state == Handshake::State::kClosed &&
                           dial.handshake->hasOfferedMemory());
      bury(std::move(dial.handshake));
      // After kDuplicate the peer's own dial is on its way to us.
      if (state != Handshake::State::kDuplicate)
        dial.retry_at = Deadline::in(kRetryPause);
    } else if (dial.retry_at.expired()) {
      attempt(worker_id, &dial);
    }
    ++it;
  }
}

Deadline Connector::nextDeadline() const {
  Deadline next = accept_at_;
  for (const auto& handshake : answers_)
    next = std::min(next, handshake->deadline());
  for (const auto& [worker_id, dial] : dials_)
    next = std::min({next, dial.deadline, dial.retry_at});
  return next;
}

}  // namespace mnemosyne::ccl
