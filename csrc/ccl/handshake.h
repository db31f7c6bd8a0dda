// How two workers prove to each other that they belong to the same job.
//
//   dialler                          listener
//      | hello: who, to whom, where, nonce ->|   and which link it had before
//      |<- challenge: where, nonce, HMAC     |   knows the secret
//      | proof: HMAC [, shared memory]     ->|   knows the secret
//      |<- verdict                           |   or: "our own dial stands",
//                                                or: "you are not a member"
//
// Both HMACs cover hello and challenge, so neither can be replayed, reflected
// or moved to another connection. Every message has a fixed size: a stranger
// gets that many bytes, and a deadline.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "ccl/event_loop.h"
#include "ccl/frame.h"
#include "ccl/transport.h"
#include "common/deadline.h"
#include "common/sha256.h"
#include "common/socket.h"

namespace mnemosyne::ccl {

constexpr uint32_t kHandshakeVersion = 2;

struct Hello {
  std::array<char, 8> magic;
  uint32_t version;
  uint32_t is_shm;
  uint64_t worker_id;
  uint64_t target_id;
  Standing at;
  // The id of the last link between the two that the dialler knows of, which is
  // dead at its end; 0 if there was none.
  uint64_t former_link;
  std::array<std::byte, 32> nonce;
};
static_assert(sizeof(Hello) == 88);

struct Challenge {
  Standing at;
  std::array<std::byte, 32> nonce;
  Digest mac;
};
static_assert(sizeof(Challenge) == 80);

enum class Verdict : uint8_t {
  kAccepted = 1,
  kDuplicate = 2,   // wait for my own dial, or use the link that we have
  kNotAMember = 3,  // of my epoch, or I am leaving: do not wait
};

Digest challengeMac(const std::string& secret, const Hello& hello,
                    const Challenge& challenge);
Digest proofMac(const std::string& secret, const Hello& hello,
                const Challenge& challenge);

// One connection on its way to become a link. Lives on the progress thread.
class Handshake final : public EventSink {
 public:
  enum class State {
    kBusy,
    kLinked,
    kDuplicate,  // the peer's own dial to us stands
    kClosed,     // the peer went away; a new attempt may help
    kRefused,    // the peer is not one of us, or not the one we look for
    kUnreachable,
    kNotAMember,
    kNoMemory,  // there is none to share; over TCP it would work
  };
  struct Self {
    uint64_t worker_id;
    std::string secret;
  };

  // Called once the dialler has proved who it is.
  using Admit = std::function<Verdict(const Hello&)>;

  // Requires: `self` outlives the handshake.
  static std::unique_ptr<Handshake> dial(const Self& self, Fd socket,
                                         bool is_shm, uint64_t target,
                                         const Standing& own,
                                         uint64_t former_link,
                                         Deadline deadline);
  static std::unique_ptr<Handshake> answer(const Self& self, Fd socket,
                                           bool is_shm,
                                           std::function<Standing()> own,
                                           Admit admit, Deadline deadline);

  // Goes as far as it can without waiting.
  void onEvents(uint32_t events) override;

  State state() const { return state_; }
  bool hasDialled() const { return has_dialled_; }
  const Deadline& deadline() const { return deadline_; }
  int fd() const { return socket_.get(); }
  // Whether the peer was given memory that it has to map.
  bool hasOfferedMemory() const { return has_dialled_ && memory_.has_value(); }
  // What the peer said, trustworthy once linked.
  uint64_t peerId() const { return peer_id_; }
  const Standing& peerStanding() const;
  // What we told the peer.
  const Standing& ownStanding() const;
  // The same on both sides, and never used before. Requires: kLinked.
  uint64_t linkId() const;
  // Requires: state() == kLinked. Called once.
  std::unique_ptr<Link> takeLink();

 private:
  enum class Step { kConnect, kHello, kChallenge, kProof, kVerdict };

  Handshake(const Self& self, Fd socket, bool is_shm, bool has_dialled,
            Deadline deadline);

  void advance();
  bool receive(void* data, size_t size);
  bool transmit(const void* data, size_t size, int passed = -1);
  void onConnected();
  void onHello();
  void onChallenge();
  void onProof();
  void onVerdict();

  const Self& self_;
  Fd socket_;
  const bool is_shm_;
  const bool has_dialled_;
  const Deadline deadline_;
  std::function<Standing()> own_;
  Admit admit_;

  State state_ = State::kBusy;
  Step step_ = Step::kConnect;
  uint64_t peer_id_ = 0;
  size_t received_ = 0;  // bytes of the message that is awaited
  Hello hello_{};
  Challenge challenge_{};
  Digest proof_{};
  Verdict verdict_{};
  Fd passed_;
  std::optional<SharedMemory> memory_;
};

}  // namespace mnemosyne::ccl
