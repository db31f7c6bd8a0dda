// A worker that is no mesh: it shakes hands as one, and then says what a test
// wants, byte by byte.
#pragma once

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <memory>
#include <string>
#include <vector>

#include "ccl/connector.h"
#include "ccl/frame.h"
#include "ccl/handshake.h"
#include "ccl/mesh.h"
#include "ccl/transport.h"
#include "common/socket.h"
#include "test.h"

namespace mnemosyne::testing {

using namespace ccl;  // NOLINT: tests only

class FakePeer {
 public:
  explicit FakePeer(uint64_t worker_id, const std::string& secret = "secret")
      : self_{worker_id, secret} {}

  // Nobody listens there: it is always this side that dials.
  Mesh::Member member() const {
    return {self_.worker_id, "nowhere||127.0.0.1|1"};
  }

  // What it takes for the members of its epoch, as a digest.
  uint64_t members = 0;
  // The link that it says it had before.
  uint64_t former_link = 0;

  // Makes a link; returns how the handshake ended.
  Handshake::State dial(const Mesh& mesh, uint64_t target, int64_t epoch,
                        bool use_shm) {
    const Address address = Address::parse(mesh.address());
    Fd socket =
        use_shm ? connectUnix(address.unix_name) : connectTcp(address.tcp);
    EXPECT(static_cast<bool>(socket));
    auto handshake = Handshake::dial(self_, std::move(socket), use_shm, target,
                                     {epoch, members}, former_link,
                                     Deadline::in(Milliseconds(15'000)));
    short wanted = POLLOUT;  // until it is connected
    while (handshake->state() == Handshake::State::kBusy) {
      EXPECT(!handshake->deadline().expired());
      waitFor(handshake->fd(), wanted);
      wanted = POLLIN;
      handshake->onEvents(EPOLLIN | EPOLLOUT);
    }
    link_.reset();
    if (handshake->state() == Handshake::State::kLinked) {
      former_link = handshake->linkId();
      link_ = handshake->takeLink();
    }
    return handshake->state();
  }

  // Returns false if the other side has gone, or does not read.
  bool say(const void* data, size_t size,
           Milliseconds patience = Milliseconds(15'000)) {
    const auto* from = static_cast<const std::byte*>(data);
    const Deadline deadline = Deadline::in(patience);
    while (size > 0) {
      const iovec part{const_cast<std::byte*>(from), size};
      const size_t n = link_->write(&part, 1);
      link_->flush();
      from += n;
      size -= n;
      if (size == 0) break;
      if (deadline.expired() || hasHungUp()) return false;
      if (link_->arm(true)) waitFor(link_->fd(), POLLIN | POLLOUT, 1);
      link_->onEvents(EPOLLIN | EPOLLOUT);
    }
    return true;
  }

  bool hear(void* data, size_t size) {
    auto* to = static_cast<std::byte*>(data);
    const Deadline deadline = Deadline::in(Milliseconds(15'000));
    while (size > 0) {
      const size_t n = link_->read(to, size);
      to += n;
      size -= n;
      if (n > 0) continue;
      if (link_->ended() || deadline.expired()) return false;
      if (link_->arm(false)) waitFor(link_->fd(), POLLIN, 100);
      link_->onEvents(EPOLLIN);
    }
    return true;
  }

  // The next frame of that type and tag; others are passed over.
  bool hearFrame(FrameType type, uint64_t tag) {
    FrameHeader frame;
    while (hear(&frame, sizeof(frame))) {
      std::vector<std::byte> payload(frame.payload_bytes);
      if (!hear(payload.data(), payload.size())) return false;
      if (frame.type == type && frame.key.tag == tag) return true;
    }
    return false;
  }

  // Loses its end without the other side's seeing it; returns what must live as
  // long as that is so.
  std::unique_ptr<Link> abandon() { return std::move(link_); }

  // As a process that dies does; `reset`: as a cut connection does.
  void hangUp(bool reset = false) {
    const linger at_once{1, 0};
    if (link_ && reset)
      ::setsockopt(link_->fd(), SOL_SOCKET, SO_LINGER, &at_once,
                   sizeof(at_once));
    link_.reset();
  }

 private:
  bool hasHungUp() {
    pollfd entry{link_->fd(), POLLRDHUP, 0};
    return ::poll(&entry, 1, 0) == 1;
  }

  static void waitFor(int fd, short events, int timeout_ms = 15'000) {
    pollfd entry{fd, events, 0};
    (void)::poll(&entry, 1, timeout_ms);
  }

  const Handshake::Self self_;
  std::unique_ptr<Link> link_;
};

}  // namespace mnemosyne::testing
