// What Mnemosyne's own Python side asks the client, by ctypes.
#include <cstring>
#include <mutex>
#include <set>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

std::mutex unsupported_mutex;
uint64_t num_unsupported = 0;

// The library may be unloaded only with the process; its server must not stay.
struct AtEnd {
  ~AtEnd() { Connection::instance().shutdown(); }
} at_end;

}  // namespace

void noteUnsupported(const char* library, const char* name) {
  std::lock_guard<std::mutex> lock(unsupported_mutex);
  static auto* named = new std::set<std::string>;
  ++num_unsupported;
  if (!named->insert(name).second) return;
  std::fprintf(stderr,
               "mnemosyne: the device proxy does not support %s of %s\n", name,
               library);
}

}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

// 0 off, 1 healthy, 2 lost, 3 restoring, 4 failed, 5 in a fork of the process.
MNEMOSYNE_EXPORT int mnemosyne_proxy_state() {
  return static_cast<int>(Connection::instance().state());
}

// The error of the lost device, or 0.
MNEMOSYNE_EXPORT int mnemosyne_proxy_error() {
  return Connection::instance().error();
}

// Takes note of the loss: a new server, with all memory at its old addresses,
// full of what is NaN in every format. Returns 0 or an error of CUDA.
MNEMOSYNE_EXPORT int mnemosyne_proxy_recover(int timeout_ms) {
  return Connection::instance().recover(timeout_ms);
}

MNEMOSYNE_EXPORT void mnemosyne_proxy_kill() { Connection::instance().kill(); }

// For a process that is to fork, and must have no thread: leaves no server
// where none is in use.
MNEMOSYNE_EXPORT void mnemosyne_proxy_rest() { Connection::instance().rest(); }

MNEMOSYNE_EXPORT int mnemosyne_proxy_server_pid() {
  return Connection::instance().serverPid();
}

// For how many seconds some thread has been waiting for the server.
MNEMOSYNE_EXPORT double mnemosyne_proxy_waiting_seconds() {
  return Connection::instance().waitingSeconds();
}

// An eventfd that becomes readable when a server is lost.
MNEMOSYNE_EXPORT int mnemosyne_proxy_lost_fd() {
  return Connection::instance().lostFd();
}

// How many servers there were.
MNEMOSYNE_EXPORT uint64_t mnemosyne_proxy_generation() {
  return Connection::instance().generation();
}

// What went wrong last, as a text of at most `size` bytes.
MNEMOSYNE_EXPORT void mnemosyne_proxy_message(char* text, int size) {
  std::snprintf(text, size, "%s", Connection::instance().message().c_str());
}

// Tells one sequence of commands from another, since the last call of this.
MNEMOSYNE_EXPORT uint64_t mnemosyne_proxy_take_trace() {
  return Connection::instance().takeTrace();
}

// Commands sent, those of them that waited for an answer, their bytes, and
// calls that were refused because the proxy does not support them.
MNEMOSYNE_EXPORT void mnemosyne_proxy_counts(uint64_t counts[4]) {
  auto& connection = Connection::instance();
  counts[0] = connection.numCommands();
  counts[1] = connection.numCalls();
  counts[2] = connection.numBytes();
  std::lock_guard<std::mutex> lock(unsupported_mutex);
  counts[3] = num_unsupported;
}
