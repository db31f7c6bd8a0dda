#include "ccl/handshake.h"

#include <sys/epoll.h>
#include <sys/random.h>

#include <cstddef>
#include <cstring>
#include <system_error>
#include <vector>

#include "common/error.h"

namespace mnemosyne::ccl {
namespace {

constexpr std::array<char, 8> kMagic = {'m', 'n', 'e', 'm', 'l', 'i', 'n', 'k'};

void fillRandom(std::array<std::byte, 32>* nonce) {
  // Never short: below 256 bytes the call is atomic (getrandom(2)).
  if (::getrandom(nonce->data(), nonce->size(), 0) !=
      static_cast<ssize_t>(nonce->size())) {
    throwErrno("getrandom");
  }
}

Digest mac(const std::string& secret, char role, const Hello& hello,
           const Challenge& challenge) {
  constexpr size_t kCovered = offsetof(Challenge, mac);
  std::vector<std::byte> text(1 + sizeof(Hello) + kCovered);
  text[0] = static_cast<std::byte>(role);
  std::memcpy(&text[1], &hello, sizeof(Hello));
  std::memcpy(&text[1 + sizeof(Hello)], &challenge, kCovered);
  return hmacSha256(std::as_bytes(std::span(secret)), text);
}

}  // namespace

Digest challengeMac(const std::string& secret, const Hello& hello,
                    const Challenge& challenge) {
  return mac(secret, 'c', hello, challenge);
}

Digest proofMac(const std::string& secret, const Hello& hello,
                const Challenge& challenge) {
  return mac(secret, 'p', hello, challenge);
}

Handshake::Handshake(const Self& self, Fd socket, bool is_shm, bool has_dialled,
                     Deadline deadline)
    : self_(self),
      socket_(std::move(socket)),
      is_shm_(is_shm),
      has_dialled_(has_dialled),
      deadline_(deadline) {}

std::unique_ptr<Handshake> Handshake::dial(const Self& self, Fd socket,
                                           bool is_shm, uint64_t target,
                                           const Standing& own,
                                           uint64_t former_link,
                                           Deadline deadline) {
  std::unique_ptr<Handshake> it(
      new Handshake(self, std::move(socket), is_shm, true, deadline));
  it->peer_id_ = target;
  it->hello_ = {kMagic, kHandshakeVersion, is_shm, self.worker_id, target,
                own,    former_link,       {}};
  fillRandom(&it->hello_.nonce);
  return it;
}

std::unique_ptr<Handshake> Handshake::answer(const Self& self, Fd socket,
                                             bool is_shm,
                                             std::function<Standing()> own,
                                             Admit admit, Deadline deadline) {
  std::unique_ptr<Handshake> it(
      new Handshake(self, std::move(socket), is_shm, false, deadline));
  it->own_ = std::move(own);
  it->admit_ = std::move(admit);
  it->step_ = Step::kHello;
  return it;
}

const Standing& Handshake::peerStanding() const {
  return has_dialled_ ? challenge_.at : hello_.at;
}

const Standing& Handshake::ownStanding() const {
  return has_dialled_ ? hello_.at : challenge_.at;
}

uint64_t Handshake::linkId() const {
  uint64_t id;
  std::memcpy(&id, proof_.data(), sizeof(id));
  return id;
}

std::unique_ptr<Link> Handshake::takeLink() {
  if (!is_shm_) return makeTcpLink(std::move(socket_));
  return makeShmLink(std::move(socket_), std::move(*memory_), has_dialled_);
}

void Handshake::onEvents(uint32_t events) {
  if (state_ != State::kBusy) return;
  if (step_ == Step::kConnect) {
    if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) return;
    if (connectError(socket_.get()) != 0) {
      state_ = State::kUnreachable;
      return;
    }
    onConnected();
  }
  advance();
}

void Handshake::advance() {
  while (state_ == State::kBusy) {
    switch (step_) {
      case Step::kConnect:
        return;
      case Step::kHello:
        if (!receive(&hello_, sizeof(hello_))) return;
        onHello();
        break;
      case Step::kChallenge:
        if (!receive(&challenge_, sizeof(challenge_))) return;
        onChallenge();
        break;
      case Step::kProof:
        if (!receive(&proof_, sizeof(proof_))) return;
        onProof();
        break;
      case Step::kVerdict:
        if (!receive(&verdict_, sizeof(verdict_))) return;
        onVerdict();
        break;
    }
  }
}

// True once the whole message is there. Never reads past it: what follows the
// verdict belongs to the link.
bool Handshake::receive(void* data, size_t size) {
  auto* to = static_cast<std::byte*>(data);
  while (received_ < size) {
    void* at = to + received_;
    const ssize_t n =
        is_shm_ ? recvWithFd(socket_.get(), at, size - received_, &passed_)
                : recvSome(socket_.get(), at, size - received_);
    if (n < 0 && wouldBlock()) return false;
    if (n <= 0) {
      state_ = State::kClosed;
      return false;
    }
    received_ += static_cast<size_t>(n);
  }
  received_ = 0;
  return true;
}

bool Handshake::transmit(const void* data, size_t size, int passed) {
  const iovec part{const_cast<void*>(data), size};
  const ssize_t n = passed >= 0 ? sendWithFd(socket_.get(), data, size, passed)
                                : sendSome(socket_.get(), &part, 1);
  // A fresh socket always has room for a few hundred bytes.
  if (n == static_cast<ssize_t>(size)) return true;
  state_ = State::kClosed;
  return false;
}

void Handshake::onConnected() {
  if (transmit(&hello_, sizeof(hello_))) step_ = Step::kChallenge;
}

void Handshake::onHello() {
  if (hello_.magic != kMagic || hello_.version != kHandshakeVersion ||
      hello_.is_shm != static_cast<uint32_t>(is_shm_) ||
      hello_.target_id != self_.worker_id ||
      hello_.worker_id == self_.worker_id) {
    state_ = State::kRefused;
    return;
  }
  peer_id_ = hello_.worker_id;
  challenge_.at = own_();
  fillRandom(&challenge_.nonce);
  challenge_.mac = challengeMac(self_.secret, hello_, challenge_);
  if (transmit(&challenge_, sizeof(challenge_))) step_ = Step::kProof;
}

void Handshake::onChallenge() {
  if (!equalDigests(challenge_.mac,
                    challengeMac(self_.secret, hello_, challenge_))) {
    state_ = State::kRefused;
    return;
  }
  proof_ = proofMac(self_.secret, hello_, challenge_);
  try {
    if (is_shm_) memory_.emplace(SharedMemory::create(shmLinkBytes()));
  } catch (const std::system_error&) {
    state_ = State::kNoMemory;  // or no descriptors
    return;
  }
  if (transmit(&proof_, sizeof(proof_), is_shm_ ? memory_->fd() : -1))
    step_ = Step::kVerdict;
}

void Handshake::onProof() {
  if (!equalDigests(proof_, proofMac(self_.secret, hello_, challenge_))) {
    state_ = State::kRefused;
    return;
  }
  if (is_shm_) {
    auto memory = SharedMemory::map(std::move(passed_), shmLinkBytes());
    if (!memory) {
      state_ = State::kRefused;
      return;
    }
    memory_.emplace(std::move(*memory));
  }
  verdict_ = admit_(hello_);
  if (transmit(&verdict_, sizeof(verdict_))) onVerdict();
}

// Given or received.
void Handshake::onVerdict() {
  switch (verdict_) {
    case Verdict::kAccepted:
      state_ = State::kLinked;
      return;
    case Verdict::kDuplicate:
      state_ = State::kDuplicate;
      return;
    case Verdict::kNotAMember:
      state_ = State::kNotAMember;
      return;
  }
  state_ = State::kRefused;
}

}  // namespace mnemosyne::ccl
