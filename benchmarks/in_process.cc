// The proxy without its ring and without its second process, for proxy_call.py
// to compare with: the same client, but each command is executed at once, by
// the server's code, in the thread that gives it. There is nothing that could
// be lost, so what a lost device needs is refused.
#include <dlfcn.h>
#include <sys/mman.h>

#include "proxy/connection.h"
#include "proxy/server.h"

namespace mnemosyne::proxy {

namespace {

std::string emulatedDevice() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&emulatedDevice), &info) == 0) return {};
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/')) + "/libmnemosyne_emulated.so";
}

}  // namespace

struct Connection::Server {
  explicit Server(SegmentHead* segment) : executor(segment, emulatedDevice()) {}
  proxy::Server executor;
  uint64_t num_records = 0;
};

int Connection::startLocked(int /*timeout_ms*/) {
  if (state_ != State::kOff) return 0;
  void* const got = mmap(
      reinterpret_cast<void*>(kSegmentBase), kSegmentBytes,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (got != reinterpret_cast<void*>(kSegmentBase)) {
    fail(kCudaInitializationError, "the address range of the segment is taken");
    return error_;
  }
  segment_ = static_cast<SegmentHead*>(got);
  server_ = std::make_shared<Server>(segment_);
  const Hello hello = server_->executor.hello();
  if (hello.error != 0) {
    fail(hello.error, hello.message);
    return error_;
  }
  num_devices_ = hello.num_devices;
  devices_.assign(hello.uuids, hello.uuids + hello.num_devices);
  driver_version_ = hello.driver_version;
  ++generation_;
  state_ = State::kHealthy;
  return 0;
}

int Connection::deliver(const CommandWriter& command, uint16_t reply) {
  thread_local bool has_entered = false;
  if (!has_entered && is_attached_) {
    server_->executor.enterThread();
    has_entered = true;
  }
  server_->executor.execute(
      {server_->num_records++, command.opcode(), reply, command.payload()});
  return 0;
}

void Connection::keepSpare() {}
void Connection::forgetServer() {}
void Connection::numberDevices() {}
void Connection::tell(ControlMessage message) {
  if (server_ != nullptr) server_->executor.abortComm(message.id);
}
void Connection::kill() {}
void Connection::shutdown() {}
int Connection::recover(int /*timeout_ms*/) { return kCudaNotSupported; }

}  // namespace mnemosyne::proxy
