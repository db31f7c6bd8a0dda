// Links on one host: two rings in shared memory, and a socket to ring a bell.
//
// Each ring has one writer and one reader. Positions only grow; what lies
// between them is full. A side that is about to sleep says so in the ring
// (`reader_waits`, `writer_waits`) and looks once more, so that the other side
// either sees the wish or has been seen: these accesses are sequentially
// consistent. A side that does not sleep just looks, and nobody rings.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "ccl/transport.h"
#include "common/socket.h"

namespace mnemosyne::ccl {
namespace {

// Large enough to hide one wake-up of the reader at memory speed, small enough
// to stay in the second-level cache.
constexpr size_t kRingBytes = 256 * 1024;
// Positions are published this often within a large write or read, so that both
// sides copy at the same time.
constexpr size_t kPublishBytes = 32 * 1024;

struct alignas(64) Ring {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  alignas(64) std::atomic<uint32_t> reader_waits;
  alignas(64) std::atomic<uint32_t> writer_waits;
  alignas(64) std::byte data[kRingBytes];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

class ShmLink final : public Link {
 public:
  ShmLink(Fd socket, SharedMemory memory, bool dialled)
      : socket_(std::move(socket)), memory_(std::move(memory)) {
    memory_.closeFd();
    auto* rings = reinterpret_cast<Ring*>(memory_.data());
    out_ = &rings[dialled ? 0 : 1];
    in_ = &rings[dialled ? 1 : 0];
  }

  int fd() const override { return socket_.get(); }
  const char* kind() const override { return "shm"; }
  bool isUnanswered(Milliseconds) override { return false; }
  // The last bytes may arrive in memory before the EOF does at the socket,
  // never after it: the ring is looked at once more when the socket has ended.
  bool ended() const override { return ended_; }
  void endWriting() override { ::shutdown(socket_.get(), SHUT_WR); }

  void onEvents(uint32_t) override {
    // To the very end: the EOF may stand behind the bells, and has no edge of
    // its own then.
    char bells[256];
    ssize_t n;
    do {
      n = recvSome(socket_.get(), bells, sizeof(bells));
    } while (n > 0);
    if (n == 0 || !wouldBlock()) hung_up_ = true;
  }

  size_t write(const iovec* parts, int num_parts) override {
    size_t total = 0;
    for (int i = 0; i < num_parts; ++i) {
      const auto* from = static_cast<const std::byte*>(parts[i].iov_base);
      const size_t n =
          hung_up_ ? parts[i].iov_len : writePart(from, parts[i].iov_len);
      total += n;
      if (n < parts[i].iov_len) break;
    }
    return total;
  }

  bool isSilent() const override { return true; }
  bool hasNews(bool wants_room) const override {
    return (hung_up_ && !ended_) || in_->written.load() != read_ ||
           (wants_room && written_ - out_->read.load() < kRingBytes);
  }

  bool arm(bool wants_room) override {
    in_->reader_waits.store(1);
    if (wants_room) out_->writer_waits.store(1);
    return !hasNews(wants_room);
  }

  void flush() override {
    // Two idle sides that rang without a cause would wake each other for ever.
    if (written_ == flushed_) return;
    flushed_ = written_;
    if (out_->reader_waits.load() != 0 && out_->reader_waits.exchange(0) != 0)
      ringBell();
  }

  size_t read(void* data, size_t size) override {
    auto* to = static_cast<std::byte*>(data);
    size_t total = 0;
    while (total < size) {
      const size_t n = readPart(to + total, size - total);
      if (n == 0) break;
      total += n;
    }
    return total;
  }

 private:
  size_t writePart(const std::byte* from, size_t size) {
    size_t total = 0;
    while (total < size) {
      size_t room = kRingBytes - (written_ - out_->read.load());
      if (room == 0) {
        flush();
        break;
      }
      // A peer that scribbles over its position can only harm its own messages.
      room = std::min(room, kRingBytes);
      const size_t at = written_ % kRingBytes;
      const size_t n =
          std::min({size - total, room, kRingBytes - at, kPublishBytes});
      std::memcpy(out_->data + at, from + total, n);
      written_ += n;
      total += n;
      out_->written.store(written_);
      if (size > kPublishBytes) flush();
    }
    return total;
  }

  size_t readPart(std::byte* to, size_t size) {
    // Read before the ring: everything was in the ring before the hang-up.
    const bool hung_up = hung_up_;
    const uint64_t full = in_->written.load() - read_;
    if (full == 0) {
      ended_ = hung_up;
      return 0;
    }
    if (full > kRingBytes) {  // not what our writer does
      ended_ = true;
      return 0;
    }
    const size_t at = read_ % kRingBytes;
    const size_t n =
        std::min<size_t>({size, full, kRingBytes - at, kPublishBytes});
    std::memcpy(to, in_->data + at, n);
    read_ += n;
    in_->read.store(read_);
    // One wake-up of the writer per half ring. It cannot be missed: the reader
    // goes on until the ring is empty.
    if (full - n <= kRingBytes / 2 && in_->writer_waits.load() != 0 &&
        in_->writer_waits.exchange(0) != 0) {
      ringBell();
    }
    return n;
  }

  void ringBell() {
    // If the socket is full of bells already, the peer will wake up anyway.
    char bell = 1;
    const iovec part{&bell, 1};
    (void)sendSome(socket_.get(), &part, 1);
  }

  Fd socket_;
  SharedMemory memory_;
  Ring* out_;
  Ring* in_;
  uint64_t flushed_ = 0;
  uint64_t written_ = 0;  // our own copies: the peer can write to the rings too
  uint64_t read_ = 0;
  bool hung_up_ = false;
  bool ended_ = false;
};

}  // namespace

std::unique_ptr<Link> makeShmLink(Fd socket, SharedMemory memory,
                                  bool dialled) {
  return std::make_unique<ShmLink>(std::move(socket), std::move(memory),
                                   dialled);
}

size_t shmLinkBytes() { return 2 * sizeof(Ring); }

}  // namespace mnemosyne::ccl
