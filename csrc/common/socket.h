// Non-blocking stream sockets, TCP and abstract Unix. No call here waits.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <string>

#include "common/fd.h"

namespace mnemosyne {

struct TcpAddress {
  std::string host;  // numeric
  uint16_t port = 0;
};

// Listens on a free port of `host`, which must be a name or address of one
// interface: a wildcard could not be told to peers. Throws std::system_error,
// or std::invalid_argument if the host does not resolve.
Fd listenTcp(const std::string& host, TcpAddress* bound);

// Listens under `name` in the abstract namespace, which needs no file.
Fd listenUnix(const std::string& name);

// Starts to connect. The socket is writable once that has ended; connectError
// then says how. An invalid Fd, with errno set, means that it failed at once.
Fd connectTcp(const TcpAddress& address);
Fd connectUnix(const std::string& name);
int connectError(int fd);

// Accepts one connection; an invalid Fd if none is waiting.
Fd acceptOne(int listener);

// As write and read, but without SIGPIPE, and retried on EINTR. -1 with errno.
ssize_t sendSome(int fd, const iovec* parts, int num_parts);
ssize_t recvSome(int fd, void* data, size_t size);

// As above; carries a descriptor beside the bytes (SCM_RIGHTS).
ssize_t sendWithFd(int fd, const void* data, size_t size, int passed);
ssize_t recvWithFd(int fd, void* data, size_t size, Fd* passed);

// Whether errno says "later", not "never".
bool wouldBlock();

}  // namespace mnemosyne
