// mnemosyne-proxy: the process that owns the device of one training process. It
// is started by the client, which leaves it two descriptors: a socket, whose
// end of file tells that the client is gone, and the segment with the ring.
// Until it is told to begin it is a spare: the next one is waiting already when
// a device is lost.
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

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

bool isToldToBegin() {
  pollfd word{kControlFd, POLLIN, 0};
  return poll(&word, 1, 0) > 0;
}

// False if the client is gone.
bool waitToBegin() {
  ssize_t size;
  do {
    size = recv(kControlFd, nullptr, 0, MSG_PEEK | MSG_TRUNC);
  } while (size < 0 && errno == EINTR);
  if (size <= 0) return false;
  std::string text(size, '\0');
  if (recv(kControlFd, text.data(), text.size(), 0) != size) return false;
  std::vector<std::string> old;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view each = *variable;
    if (isOurVariable(each)) old.emplace_back(each.substr(0, each.find('=')));
  }
  for (const auto& name : old) unsetenv(name.c_str());
  std::istringstream variables(text);
  for (std::string each; std::getline(variables, each, '\0');) {
    const size_t equals = each.find('=');
    setenv(each.substr(0, equals).c_str(), each.c_str() + equals + 1, 1);
  }
  return true;
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
  server.load(!isToldToBegin());
  if (!waitToBegin()) _exit(0);
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
