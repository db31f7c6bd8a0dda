// Links between hosts: the kernel's socket buffers are the channel.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "ccl/transport.h"
#include "common/socket.h"

namespace mnemosyne::ccl {
namespace {

class TcpLink final : public Link {
 public:
  explicit TcpLink(Fd socket) : socket_(std::move(socket)) {}

  int fd() const override { return socket_.get(); }
  const char* kind() const override { return "tcp"; }
  bool ended() const override { return ended_ && begin_ == end_; }
  void flush() override {}
  bool isSilent() const override { return false; }
  bool hasNews(bool) const override { return false; }
  bool arm(bool) override { return true; }
  void endWriting() override { ::shutdown(socket_.get(), SHUT_WR); }

  bool isUnanswered(Milliseconds patience) override {
    const auto now = Clock::now();
    tcp_info info{};
    socklen_t size = sizeof(info);
    if (::getsockopt(socket_.get(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0)
      return false;
    // Data, or the question whether a window that was shut is open again.
    const bool waits = info.tcpi_unacked > 0 || info.tcpi_probes > 0;
    const auto heard_at = now - Milliseconds(info.tcpi_last_ack_recv);
    // Who was stopped for long knows nothing of the time between.
    const bool knows = now - std::exchange(asked_at_, now) < patience / 2;
    if (!waits || !knows || heard_at >= waits_since_) waits_since_ = now;
    return now - waits_since_ >= patience;
  }

  void onEvents(uint32_t events) override {
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) readable_ = true;
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) writable_ = true;
  }

  size_t write(const iovec* parts, int num_parts) override {
    size_t total = 0;
    for (int i = 0; i < num_parts; ++i) total += parts[i].iov_len;
    if (broken_) return total;
    if (!writable_) return 0;
    const ssize_t n = sendSome(socket_.get(), parts, num_parts);
    if (n < 0 && !wouldBlock()) {
      broken_ = true;
      return total;
    }
    // A short count means that the buffer is full: an event will come.
    writable_ = n == static_cast<ssize_t>(total);
    return n < 0 ? 0 : static_cast<size_t>(n);
  }

  size_t read(void* data, size_t size) override {
    if (begin_ == end_) {
      // What is large goes to its place at once, and so does the header of what
      // follows it, which is likely to be large too. Other headers and small
      // messages are read many at a time.
      const bool is_bulk = size >= buffer_.size() / 4;
      if (std::exchange(was_bulk_, is_bulk) || is_bulk)
        return receive(data, size);
      begin_ = 0;
      end_ = receive(buffer_.data(), buffer_.size());
    }
    const size_t n = std::min(size, end_ - begin_);
    std::memcpy(data, buffer_.data() + begin_, n);
    begin_ += n;
    return n;
  }

 private:
  size_t receive(void* data, size_t size) {
    if (!readable_ || ended_) return 0;
    const ssize_t n = recvSome(socket_.get(), data, size);
    if (n > 0) return static_cast<size_t>(n);
    if (n < 0 && wouldBlock()) {
      readable_ = false;
    } else {
      ended_ = true;  // EOF, reset, or a host that does not answer
    }
    return 0;
  }

  Fd socket_;
  Clock::time_point asked_at_ = Clock::now();
  Clock::time_point waits_since_ = asked_at_;
  bool readable_ = true;
  bool writable_ = true;
  bool broken_ = false;
  bool ended_ = false;
  bool was_bulk_ = false;
  std::array<std::byte, 1 << 16> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
};

}  // namespace

std::unique_ptr<Link> makeTcpLink(Fd socket) {
  return std::make_unique<TcpLink>(std::move(socket));
}

}  // namespace mnemosyne::ccl
