#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cstring>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "ccl/transport.h"
#include "common/deadline.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

using namespace ccl;  // NOLINT: tests only

struct Pair {
  std::unique_ptr<Link> a;
  std::unique_ptr<Link> b;
  std::byte* memory = nullptr;
};

Pair makePair(bool is_shm) {
  int fds[2];
  const int flags = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
  EXPECT_EQ(::socketpair(AF_UNIX, flags, 0, fds), 0);
  Fd one = Fd::make([&] { return fds[0]; });
  Fd other = Fd::make([&] { return fds[1]; });
  // The TCP link does nothing that a Unix stream socket could not do.
  if (!is_shm)
    return {makeTcpLink(std::move(one)), makeTcpLink(std::move(other))};
  SharedMemory mine = SharedMemory::create(shmLinkBytes());
  Fd copy = Fd::make([&] { return ::dup(mine.fd()); });
  auto theirs = SharedMemory::map(std::move(copy), shmLinkBytes());
  EXPECT(theirs.has_value());
  std::byte* memory = mine.data();
  return {makeShmLink(std::move(one), std::move(mine), true),
          makeShmLink(std::move(other), std::move(*theirs), false), memory};
}

// Waits as the mesh does: for an edge, and only for one.
class Waiter {
 public:
  explicit Waiter(Link& link)
      : link_(link),
        epoll_(Fd::make([] { return ::epoll_create1(EPOLL_CLOEXEC); })) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    EXPECT_EQ(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, link.fd(), &event), 0);
  }
  void wait(bool for_room = false) {
    if (link_.arm(for_room)) waitForEvent();
  }
  void waitForEvent() {
    epoll_event event{};
    EXPECT_EQ(::epoll_wait(epoll_.get(), &event, 1, 20'000), 1);
    link_.onEvents(event.events);
  }

 private:
  Link& link_;
  Fd epoll_;
};

std::byte patternAt(size_t i) { return static_cast<std::byte>(i * 131 >> 3); }

void writeAll(Link& link, size_t total, unsigned seed) {
  Waiter waiter(link);
  std::mt19937 random(seed);
  std::vector<std::byte> piece;
  for (size_t at = 0; at < total;) {
    piece.resize(std::min<size_t>(total - at, 1 + random() % 200'000));
    for (size_t i = 0; i < piece.size(); ++i) piece[i] = patternAt(at + i);
    size_t done = 0;
    while (done < piece.size()) {
      const size_t half = (piece.size() - done) / 2;
      const iovec parts[2] = {
          {piece.data() + done, half},
          {piece.data() + done + half, piece.size() - done - half}};
      const size_t n = link.write(parts, 2);
      link.flush();
      done += n;
      if (done < piece.size()) waiter.wait(true);
    }
    at += piece.size();
  }
  link.endWriting();
}

void readAll(Link& link, size_t total, unsigned seed) {
  Waiter waiter(link);
  std::mt19937 random(seed);
  std::vector<std::byte> piece(100'000);
  size_t at = 0;
  while (!link.ended()) {
    const size_t n = link.read(piece.data(), 1 + random() % piece.size());
    for (size_t i = 0; i < n; ++i)
      if (piece[i] != patternAt(at + i)) throw std::runtime_error("wrong byte");
    at += n;
    if (n == 0 && !link.ended()) waiter.wait();
  }
  EXPECT_EQ(at, total);
}

void stream(bool is_shm) {
  Pair pair = makePair(is_shm);
  constexpr size_t kTotal = 20'000'000;
  std::optional<std::string> error;
  std::thread reader([&] {
    try {
      readAll(*pair.b, kTotal, 2);
    } catch (const std::exception& caught) {
      error = caught.what();
    }
  });
  writeAll(*pair.a, kTotal, 1);
  reader.join();
  EXPECT_EQ(error.value_or("none"), "none");
}

}  // namespace

TEST(tcp_bytes_arrive_in_order_and_then_the_end) { stream(false); }
TEST(shm_bytes_arrive_in_order_and_then_the_end) { stream(true); }

TEST(what_was_sent_before_a_death_is_read_before_the_end) {
  for (bool is_shm : {false, true}) {
    Pair pair = makePair(is_shm);
    char text[] = "last words";
    const iovec part{text, sizeof(text)};
    EXPECT_EQ(pair.a->write(&part, 1), sizeof(text));
    pair.a.reset();
    Waiter waiter(*pair.b);
    waiter.waitForEvent();
    char heard[sizeof(text)];
    EXPECT(!pair.b->ended());
    EXPECT_EQ(pair.b->read(heard, sizeof(heard)), sizeof(text));
    EXPECT_EQ(std::string(heard), "last words");
    EXPECT_EQ(pair.b->read(heard, sizeof(heard)), size_t{0});
    EXPECT(pair.b->ended());
    // Writing to the dead is no error: reading finds out.
    EXPECT_EQ(pair.b->write(&part, 1), sizeof(text));
    EXPECT_EQ(pair.b->write(&part, 1), sizeof(text));
  }
}

TEST(a_ring_with_impossible_positions_ends_the_link) {
  Pair pair = makePair(true);
  const uint64_t nonsense = ~uint64_t{0} / 2;
  std::memcpy(pair.memory, &nonsense, sizeof(nonsense));  // ring 0, written
  char byte;
  EXPECT_EQ(pair.b->read(&byte, 1), size_t{0});
  EXPECT(pair.b->ended());
}

TEST(shared_memory_that_could_shrink_is_refused) {
  SharedMemory memory = SharedMemory::create(4096);
  Fd copy = Fd::make([&] { return ::dup(memory.fd()); });
  EXPECT(!SharedMemory::map(std::move(copy), 8192).has_value());
  int fds[2];
  EXPECT_EQ(::pipe(fds), 0);
  Fd reader = Fd::make([&] { return fds[0]; });
  Fd writer = Fd::make([&] { return fds[1]; });
  EXPECT(!SharedMemory::map(std::move(reader), 4096).has_value());
  EXPECT(!SharedMemory::map(Fd(), 4096).has_value());
}

}  // namespace mnemosyne::testing
