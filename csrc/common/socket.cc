#include "common/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "common/error.h"

namespace mnemosyne {
namespace {

constexpr int kStream = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
constexpr int kBacklog = 4096;  // the kernel lowers it to net.core.somaxconn

using AddressList = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

AddressList resolve(const std::string& host, uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const std::string service = std::to_string(port);
  const int error =
      ::getaddrinfo(host.c_str(), service.c_str(), &hints, &found);
  if (error != 0) {
    throw std::invalid_argument("cannot resolve host '" + host +
                                "': " + ::gai_strerror(error));
  }
  return AddressList(found, &::freeaddrinfo);
}

// The name of an abstract socket starts with a zero byte and is not terminated.
socklen_t abstractAddress(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof(address->sun_path))
    throw std::invalid_argument("socket name is too long: " + name);
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 +
                                name.size());
}

Fd openSocket(int family) {
  return Fd::make([&] { return ::socket(family, kStream, 0); });
}

void setOption(int fd, int level, int option, int value) {
  // Only tuning: a kernel that refuses one of these still works.
  (void)::setsockopt(fd, level, option, &value, sizeof(value));
}

void tune(int fd) {
  setOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  // A host that lost its power sends no RST: ask after 10 s, give up after 25
  // s.
  setOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  setOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, 10);
  setOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  setOption(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

Fd startConnect(Fd fd, const sockaddr* address, socklen_t size) {
  if (::connect(fd.get(), address, size) == 0 || errno == EINPROGRESS)
    return fd;
  const int error = errno;
  fd.reset();
  errno = error;
  return fd;
}

}  // namespace

Fd listenTcp(const std::string& host, TcpAddress* bound) {
  const AddressList found = resolve(host, 0, AI_PASSIVE);
  Fd fd = openSocket(found->ai_family);
  if (!fd || ::bind(fd.get(), found->ai_addr, found->ai_addrlen) != 0 ||
      ::listen(fd.get(), kBacklog) != 0) {
    throwErrno("cannot listen on " + host);
  }
  sockaddr_storage name{};
  socklen_t size = sizeof(name);
  auto* address = reinterpret_cast<sockaddr*>(&name);
  if (::getsockname(fd.get(), address, &size) != 0) throwErrno("getsockname");
  char text[NI_MAXHOST];
  char port[NI_MAXSERV];
  ::getnameinfo(address, size, text, sizeof(text), port, sizeof(port),
                NI_NUMERICHOST | NI_NUMERICSERV);
  *bound = {text, static_cast<uint16_t>(std::stoi(port))};
  if (bound->host == "0.0.0.0" || bound->host == "::")
    throw std::invalid_argument(
        "bind_host must be an address that peers can reach, not a wildcard");
  return fd;
}

Fd listenUnix(const std::string& name) {
  sockaddr_un address;
  const socklen_t size = abstractAddress(name, &address);
  Fd fd = openSocket(AF_UNIX);
  if (!fd ||
      ::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::listen(fd.get(), kBacklog) != 0) {
    throwErrno("cannot listen on @" + name);
  }
  return fd;
}

Fd connectTcp(const TcpAddress& address) {
  const AddressList found = resolve(address.host, address.port, AI_NUMERICHOST);
  Fd fd = openSocket(found->ai_family);
  if (!fd) return fd;
  tune(fd.get());
  return startConnect(std::move(fd), found->ai_addr, found->ai_addrlen);
}

Fd connectUnix(const std::string& name) {
  sockaddr_un address;
  const socklen_t size = abstractAddress(name, &address);
  Fd fd = openSocket(AF_UNIX);
  if (!fd) return fd;
  return startConnect(std::move(fd), reinterpret_cast<sockaddr*>(&address),
                      size);
}

int connectError(int fd) {
  int error = 0;
  socklen_t size = sizeof(error);
  if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
  return error;
}

Fd acceptOne(int listener) {
  Fd fd = Fd::make([&] {
    return ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  });
  if (fd) tune(fd.get());
  return fd;
}

ssize_t sendSome(int fd, const iovec* parts, int num_parts) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(parts);
  message.msg_iovlen = num_parts;
  ssize_t n;
  do {
    n = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  return n;
}

ssize_t recvSome(int fd, void* data, size_t size) {
  ssize_t n;
  do {
    n = ::recv(fd, data, size, MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  return n;
}

ssize_t sendWithFd(int fd, const void* data, size_t size, int passed) {
  iovec part{const_cast<void*>(data), size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &passed, sizeof(int));
  ssize_t n;
  do {
    n = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  return n;
}

ssize_t recvWithFd(int fd, void* data, size_t size, Fd* passed) {
  iovec part{data, size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t n = 0;
  Fd received = Fd::make([&] {
    do {
      n = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    const cmsghdr* header = n < 0 ? nullptr : CMSG_FIRSTHDR(&message);
    if (header == nullptr || header->cmsg_level != SOL_SOCKET ||
        header->cmsg_type != SCM_RIGHTS) {
      return -1;
    }
    // Padding leaves room for a second one, which nobody honest sends.
    int fds[2] = {-1, -1};
    std::memcpy(fds, CMSG_DATA(header), header->cmsg_len - CMSG_LEN(0));
    if (fds[1] >= 0) ::close(fds[1]);
    return fds[0];
  });
  if (received) *passed = std::move(received);
  return n;
}

bool wouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK; }

}  // namespace mnemosyne
