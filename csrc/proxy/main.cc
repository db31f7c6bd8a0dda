// mnemosyne-proxy: the process that owns the device of one training process. It
// is started by the client, which leaves it two descriptors: a socket, whose
// end of file tells that the client is gone, and the segment with the ring.
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <thread>

#include "proxy/server.h"

namespace mnemosyne::proxy {
namespace {

// Beside the program.
std::string emulatedDevice() {
  const char* device = std::getenv("MNEMOSYNE_PROXY_DEVICE");
  if (device == nullptr || std::strcmp(device, "emulated") != 0) return {};
  char path[4096];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof path);
  if (size <= 0) return {};
  const std::string program(path, size);
  return program.substr(0, program.rfind('/')) + "/libmnemosyne_emulated.so";
}

// Until the client is gone; then there is nothing left to do, whatever the
// device is doing.
void listen(Server& server) {
  for (;;) {
    ControlMessage message{};
    const ssize_t got = recv(kControlFd, &message, sizeof message, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) _exit(0);
    if (got != sizeof message) continue;
    if (message.what == Control::kAbortComm) server.abortComm(message.id);
  }
}

int serve() {
  // The terminal's signals are the training process's business.
  signal(SIGINT, SIG_IGN);
  signal(SIGTERM, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
  void* segment =
      mmap(reinterpret_cast<void*>(kSegmentBase), kSegmentBytes,
           PROT_READ | PROT_WRITE,
           MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, kSegmentFd, 0);
  if (segment != reinterpret_cast<void*>(kSegmentBase)) {
    std::fprintf(
        stderr,
        "mnemosyne-proxy is started by a training process that runs under "
        "the device proxy; it does nothing by itself\n");
    return 64;
  }
  Server server(static_cast<SegmentHead*>(segment), emulatedDevice());
  const Hello hello = server.hello();
  if (send(kControlFd, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello)
    return 1;
  if (hello.error != 0) return 1;
  std::thread([&server] { listen(server); }).detach();
  server.run();
  _exit(0);  // what is in progress on the device ends with the process
}

}  // namespace
}  // namespace mnemosyne::proxy

int main() {
  try {
    return mnemosyne::proxy::serve();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mnemosyne-proxy: %s\n", error.what());
    _exit(65);
  }
}
