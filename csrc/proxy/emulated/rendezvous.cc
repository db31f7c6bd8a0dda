#include "proxy/emulated/rendezvous.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace mnemosyne::proxy::emulated {
namespace {

constexpr char kPrefix[] = "mnemosyne-nccl-";

// What a rank says when it comes.
struct Hello {
  int num_ranks;
  int rank;
};

socklen_t addressOf(const NcclUniqueId& id, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  static_assert(sizeof address->sun_path < sizeof id.bytes);
  const size_t size = strnlen(reinterpret_cast<const char*>(id.bytes),
                              sizeof address->sun_path - 1);
  // The name begins behind a zero: it is in no file system.
  std::memcpy(address->sun_path + 1, id.bytes, size);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + size);
}

template <typename Call>
auto retry(Call&& call) {
  decltype(call()) result;
  do {
    result = call();
  } while (result < 0 && errno == EINTR);
  return result;
}

bool sendFd(int socket, int fd) {
  char byte = 0;
  iovec bytes = {&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  msghdr message = {};
  message.msg_iov = &bytes;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const head = CMSG_FIRSTHDR(&message);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(head), &fd, sizeof fd);
  return retry([&] { return sendmsg(socket, &message, MSG_NOSIGNAL); }) == 1;
}

// Waits for a descriptor; none if the other side is gone.
Fd receiveFd(int socket) {
  char byte;
  if (retry([&] { return recv(socket, &byte, 1, MSG_PEEK); }) != 1) return Fd();
  return Fd::make([&] {  // it is there, so this does not block
    iovec bytes = {&byte, 1};
    int fd = -1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)];
    msghdr message = {};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) == 1) {
      const cmsghdr* const head = CMSG_FIRSTHDR(&message);
      if (head != nullptr && head->cmsg_type == SCM_RIGHTS) {
        std::memcpy(&fd, CMSG_DATA(head), sizeof fd);
      }
    }
    return fd;
  });
}

// A connection, once there is one.
Fd acceptFrom(const Fd& listener) {
  pollfd ready = {listener.get(), POLLIN, 0};
  if (retry([&] { return poll(&ready, 1, -1); }) != 1) return Fd();
  return Fd::make(
      [&] { return accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC); });
}

// The thread of a meeting. A rank that breaks the rules ends it for all: their
// sockets close, and no segment has come.
void hold(const Fd& listener) {
  std::vector<Fd> ranks;
  size_t num_come = 0;
  do {
    Fd socket = acceptFrom(listener);
    if (!socket) continue;
    Hello hello;
    const auto size = retry(
        [&] { return recv(socket.get(), &hello, sizeof hello, MSG_WAITALL); });
    if (size != sizeof hello) continue;  // died, or gave up
    if (ranks.empty() && hello.num_ranks > 0) ranks.resize(hello.num_ranks);
    const auto rank = static_cast<size_t>(hello.rank);
    if (static_cast<size_t>(hello.num_ranks) != ranks.size() ||
        rank >= ranks.size() || ranks[rank]) {
      std::fprintf(stderr,
                   "emulated device: rank %d of %d, who is not expected"
                   " among %zu\n",
                   hello.rank, hello.num_ranks, ranks.size());
      return;
    }
    ranks[rank] = std::move(socket);
    ++num_come;
  } while (num_come == 0 || num_come < ranks.size());
  const SharedMemory segment =
      SharedMemory::create(Wire::segmentBytes(static_cast<int>(ranks.size())));
  for (const Fd& rank : ranks) sendFd(rank.get(), segment.fd());
}

}  // namespace

int openMeeting(NcclUniqueId* id) {
  uint64_t random[2];
  if (getrandom(random, sizeof random, 0) != sizeof random) {
    return kNcclSystemError;
  }
  *id = {};
  std::snprintf(reinterpret_cast<char*>(id->bytes), sizeof id->bytes,
                "%s%016llx%016llx", kPrefix,
                static_cast<unsigned long long>(random[0]),
                static_cast<unsigned long long>(random[1]));
  sockaddr_un address;
  const socklen_t size = addressOf(*id, &address);
  Fd listener = Fd::make([] {
    return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  });
  if (!listener ||
      bind(listener.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener.get(), SOMAXCONN) != 0) {
    return kNcclSystemError;
  }
  // Detached: ranks may never come.
  std::thread([listener = std::move(listener)] {
    try {
      hold(listener);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "emulated device: %s\n", error.what());
    }
  }).detach();
  return kNcclSuccess;
}

int Visit::join(const NcclUniqueId& id, int num_ranks, int rank,
                Segment* segment) {
  if (num_ranks == 1) return kNcclSuccess;
  sockaddr_un address;
  const socklen_t size = addressOf(id, &address);
  auto socket = std::make_shared<Fd>(Fd::make(
      [] { return ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); }));
  if (!*socket) return kNcclSystemError;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_cancelled_) return kNcclInternalError;
    socket_ = socket;
  }
  const auto* const to = reinterpret_cast<const sockaddr*>(&address);
  const Hello hello = {num_ranks, rank};
  if (retry([&] { return connect(socket->get(), to, size); }) != 0 ||
      retry([&] {
        return send(socket->get(), &hello, sizeof hello, MSG_NOSIGNAL);
      }) != sizeof hello) {
    return kNcclSystemError;
  }
  auto mapped = SharedMemory::map(receiveFd(socket->get()),
                                  Wire::segmentBytes(num_ranks));
  if (!mapped.has_value()) return kNcclRemoteError;
  mapped->closeFd();
  *segment = std::make_shared<SharedMemory>(std::move(*mapped));
  return kNcclSuccess;
}

void Visit::cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_cancelled_ = true;
  if (socket_ != nullptr) shutdown(socket_->get(), SHUT_RDWR);
}

}  // namespace mnemosyne::proxy::emulated
