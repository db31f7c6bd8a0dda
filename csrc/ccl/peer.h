// The protocol with one worker: messages, the eager window, grants, and the
// fence.
//
// All with the engine held. docs/design.md, "Frames" and "Fence".
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ccl/event_loop.h"
#include "ccl/frame.h"
#include "ccl/transfer.h"
#include "ccl/transport.h"

namespace mnemosyne::ccl {

class Peer final : public EventSink {
 public:
  class Host {
   public:
    virtual ~Host() = default;
    virtual int64_t epoch() const = 0;
    virtual uint64_t membersDigest() const = 0;
    virtual bool hasFailed() const = 0;
    virtual void onTransferDone(Operation* op, Transfer* transfer) = 0;
    // Whether the collective that the key belongs to is of another kind here
    // than the signature says, or is over and has had all its messages.
    virtual bool contradicts(const MessageKey& key, uint16_t signature) = 0;
    // A point-to-point message that nobody has asked this peer for yet.
    virtual void onArrival(Peer& peer, const MessageKey& key) = 0;
    virtual void onMismatch(Peer& peer, const std::string& what) = 0;
    // Whether this side's part in the message's group is over.
    virtual bool isClosed(const MessageKey& key) const = 0;
    // The peer's part is.
    virtual void onClose(Peer& peer, const MessageKey& key, Closing why) = 0;
    // A message to or from a peer that has left its group.
    virtual void onMissed(Peer& peer, const MessageKey& key) = 0;
    // The peer's marker has come.
    virtual void onMarker(Peer& peer) = 0;
    // A pending or new message cannot be completed: the worker died, or left.
    virtual void onLost(Peer& peer, const std::string& why) = 0;
    // There is something to send, or an event; pump() is to be called soon.
    virtual void onWork(Peer& peer) = 0;
    // A link was let go of.
    virtual void onUnlinked(Peer& peer) = 0;
    // The link's descriptor is about to be closed.
    virtual void onClosing(int fd) = 0;
    virtual void onBytes(size_t sent, size_t received) = 0;
  };

  enum class State {
    kUnlinked,
    kOpen,
    kGone,  // it said farewell, or its link broke
  };

  Peer(Host& host, uint64_t worker_id) : host_(host), worker_id_(worker_id) {}

  uint64_t workerId() const { return worker_id_; }
  int64_t epoch() const { return at_.epoch; }  // of its last marker
  uint64_t membersDigest() const { return at_.members; }
  State state() const { return state_; }
  bool hasDeparted() const { return has_departed_; }
  int64_t linkedAt() const { return linked_at_; }  // epoch
  const char* linkKind() const { return link_ ? link_->kind() : "none"; }

  // Takes a new link; what was queued goes over it. `theirs` and `ours` are
  // those told in the handshake.
  void attach(std::unique_ptr<Link> link, const Standing& theirs,
              const Standing& ours);
  // Drops the link and says why to whom it may concern.
  void drop(const std::string& why);

  // Gives up the link if its host has acknowledged nothing for that long.
  void checkSilence(Milliseconds patience);

  // Closes the link without telling anybody.
  void discard();
  // Gives the link up without a failure, if nothing of this epoch has gone over
  // it: it broke before, and what is queued goes over the next. Else false.
  bool letGo();

  // Starts, and withdraws, a transfer.
  void post(Transfer* transfer);
  void withdraw(Transfer* transfer);
  // Whether the message is here, or announced, and nobody has asked for it.
  bool hasArrived(const MessageKey& key) const;
  // Whether the peer has sent, or asked for, a message of this collective as of
  // another one; then both are told.
  bool differs(const MessageKey& key, uint16_t signature);

  // Starts a new epoch. Requires: no transfer is pending.
  void fence();
  void sayFarewell();

  // Tells the peer that our part in a group is over, and forgets its messages.
  // Requires: no transfer of it is pending.
  void sayClosed(uint64_t group, uint64_t generation, Closing why);
  void forget(uint64_t group);
  // Whether the peer has left the message's group in this epoch.
  bool hasLeft(const MessageKey& key) const;
  void setLeft(const MessageKey& key);

  void onEvents(uint32_t events) override;
  // Sends and receives what is possible now.
  void pump();
  bool hasOutput() const;
  // As Link: for the peers of the mesh that nobody listens to.
  bool isSilent() const { return link_ && link_->isSilent(); }
  bool isSocket() const { return link_ && !link_->isSilent(); }
  bool hasNews() const {
    return link_ && !isAhead() && link_->hasNews(hasOutput());
  }
  bool arm() { return !link_ || isAhead() || link_->arm(hasOutput()); }

  // In the mesh's list of peers to pump.
  bool is_listed = false;
  // Its death is expected.
  bool is_excused = false;

 private:
  // It waits, its frames unread, until we are in its epoch too.
  bool isAhead() const { return at_.epoch > host_.epoch(); }

  // What is known of a message that is to be received.
  struct Inbound {
    Transfer* receiver = nullptr;
    bool is_announced = false;
    bool is_complete = false;  // all of `early` is there
    uint16_t signature = 0;
    uint64_t total = 0;
    std::vector<std::byte> early;  // came before anybody asked
  };
  // What is known of a message that is to be sent.
  struct Outbound {
    Transfer* sender = nullptr;
    bool is_granted = false;
    uint16_t signature = 0;
    uint64_t total = 0;
  };

  void postSend(Transfer* transfer);
  void postRecv(Transfer* transfer);
  void enqueue(Transfer* transfer);
  bool unlink(Transfer* transfer);
  void control(FrameType type, const MessageKey& key, uint16_t signature,
               uint64_t total);
  bool fits(const Transfer& mine, uint64_t total, uint16_t signature);
  bool isForeign();
  void tellForeign(const MessageKey& key);
  void giveBack(uint64_t total);

  void receiveAll();
  void onHeader();
  void onData();
  void onPayloadEnd();
  void onRequest();
  void onGrant();
  void onEnd();
  void refuse(const std::string& why);

  void sendAll();
  bool nextFrame();
  void onFrameSent();

  Host& host_;
  const uint64_t worker_id_;
  std::unique_ptr<Link> link_;
  State state_ = State::kUnlinked;
  Standing at_;
  int64_t linked_at_ = -1;
  bool has_departed_ = false;
  // Something of this epoch, beyond its marker, may be lost with the link.
  bool has_spoken_ = false;

  std::map<MessageKey, Inbound> inbound_;
  std::map<MessageKey, Outbound> outbound_;
  // How many generations of a group the peer has left.
  std::unordered_map<uint64_t, uint64_t> left_;
  uint64_t window_ = kWindowBytes;  // what we may still send unasked
  uint64_t owed_ = 0;               // what the peer may send again, untold
  uint64_t early_bytes_ = 0;        // in the window it uses now

  // The frame that is being received.
  FrameHeader in_;
  size_t in_header_bytes_ = 0;
  size_t in_left_ = 0;          // of the payload
  std::byte* in_to_ = nullptr;  // null: thrown away
  Transfer* in_transfer_ = nullptr;
  bool in_early_ = false;
  bool in_counted_ = false;  // in early_bytes_, and nobody has given it back

  // The frame that is being sent.
  FrameHeader out_;
  size_t out_header_left_ = 0;
  const std::byte* out_from_ = nullptr;
  size_t out_left_ = 0;
  Transfer* out_transfer_ = nullptr;
  std::vector<std::byte> rest_;  // of a frame whose transfer was withdrawn
  // What is to be sent next: control frames first, then messages in turn.
  std::vector<FrameHeader> control_;
  size_t control_sent_ = 0;
  Transfer* queue_first_ = nullptr;
  Transfer* queue_last_ = nullptr;
};

}  // namespace mnemosyne::ccl
