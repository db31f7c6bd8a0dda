// The server processes of a connection: their start, their end, and what a new
// one is told.
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include "proxy/connection.h"

extern char** environ;

namespace mnemosyne::proxy {

constexpr int kEndTimeoutMs = 2'000;

// A server process. Its descriptors close in a forked child by themselves.
struct Connection::Server {
  pid_t pid = -1;
  Fd pidfd;
  Fd control;

  void endNow() {
    if (pidfd) syscall(SYS_pidfd_send_signal, pidfd.get(), SIGKILL, nullptr, 0);
  }
  // Whether it ended before the deadline.
  bool waitForEnd(Deadline deadline) {
    pollfd end{pidfd.get(), POLLIN, 0};
    while (poll(&end, 1, deadline.remainingMs()) < 0 && errno == EINTR) {
    }
    return (end.revents & POLLIN) != 0;
  }
  // For one that nobody watches.
  void endAndReap() {
    endNow();
    if (waitForEnd(Deadline::in(Milliseconds(kEndTimeoutMs))))
      waitpid(pid, nullptr, 0);
  }
};

namespace {

// The folder that this library is in.
std::string ownFolder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&ownFolder), &info) == 0) return ".";
  const std::string path = info.dli_fname;
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string serverPath() {
  const char* path = std::getenv("MNEMOSYNE_PROXY_SERVER");
  return path != nullptr ? path : ownFolder() + "/mnemosyne-proxy";
}

// Where those of NVIDIA's libraries lie that this process has loaded: with
// torch's wheels in folders that only torch knows. The server must have the
// same.
std::string libraryFolders() {
  std::set<std::string> folders;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        const std::string_view path = info->dlpi_name;
        const auto slash = path.rfind('/');
        if (slash == path.npos) return 0;
        for (const char* name : {"libcudart.so.", "libcublas.so.",
                                 "libcublasLt.so.", "libnccl.so."}) {
          if (!path.substr(slash + 1).starts_with(name)) continue;
          static_cast<std::set<std::string>*>(to)->emplace(path, 0, slash);
        }
        return 0;
      },
      &folders);
  std::string all;
  for (const auto& folder : folders) {
    all += (all.empty() ? "" : ":") + folder;
  }
  return all;
}

// Our environment, without the preload: the server talks to the real device.
std::vector<std::string> serverEnvironment() {
  const std::string_view kPreload = "LD_PRELOAD=", kPath = "LD_LIBRARY_PATH=";
  std::vector<std::string> variables;
  std::string path = libraryFolders();
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view text = *variable;
    if (text.starts_with(kPreload)) continue;
    if (!text.starts_with(kPath)) {
      variables.emplace_back(text);
    } else if (text.size() > kPath.size()) {
      (path += path.empty() ? "" : ":") += text.substr(kPath.size());
    }
  }
  if (!path.empty()) variables.push_back(std::string(kPath) + path);
  return variables;
}

// What a server is told when it begins, see protocol.h.
std::string beginning(uint64_t generation) {
  std::string text;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (!isOurVariable(*variable)) continue;
    text.append(*variable).push_back('\0');
  }
  text += "MNEMOSYNE_PROXY_GENERATION=" + std::to_string(generation);
  text.push_back('\0');
  return text;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> all;
  for (auto& string : strings) all.push_back(string.data());
  all.push_back(nullptr);
  return all;
}

}  // namespace

int Connection::startLocked(int timeout_ms) {
  switch (state_.load()) {
    case State::kOff:
      break;
    case State::kHealthy:
      return 0;
    case State::kChild:
      return kCudaInitializationError;
    default:
      return error_;
  }
  segment_fd_ =
      Fd::make([] { return memfd_create("mnemosyne-proxy", MFD_CLOEXEC); });
  if (!segment_fd_ || ftruncate(segment_fd_.get(), kSegmentBytes) != 0) {
    fail(kCudaInitializationError,
         "cannot make the segment: " + std::string(std::strerror(errno)));
    return error_;
  }
  const auto map = [](uint64_t base, uint64_t size, int protection, int flags,
                      int fd) {
    void* got = mmap(reinterpret_cast<void*>(base), size, protection,
                     flags | MAP_NORESERVE | MAP_FIXED_NOREPLACE, fd, 0);
    return got == reinterpret_cast<void*>(base);
  };
  // No pointer of this process can be taken for one of the device.
  if (!map(kSegmentBase, kSegmentBytes, PROT_READ | PROT_WRITE, MAP_SHARED,
           segment_fd_.get()) ||
      !map(kDeviceBase, kDeviceBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
           -1)) {
    fail(kCudaInitializationError,
         "the address ranges of the proxy are taken: " +
             std::string(std::strerror(errno)));
    return error_;
  }
  segment_ = reinterpret_cast<SegmentHead*>(kSegmentBase);
  if (const int error = launch(timeout_ms); error != 0) {
    state_ = State::kFailed;
    return error;
  }
  state_ = State::kHealthy;
  return 0;
}

// Starts a server process, which then waits for begin(). Null if it cannot.
std::shared_ptr<Connection::Server> Connection::spawn() {
  auto server = std::make_shared<Server>();
  int sockets[2];
  server->control = Fd::make([&] {
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0)
      return -1;
    return sockets[0];
  });
  if (!server->control) return nullptr;
  Fd theirs = Fd::make([&] { return sockets[1]; });

  const std::string path = serverPath();
  std::vector<std::string> arguments{path};
  std::vector<std::string> environment = serverEnvironment();
  // dup2 onto itself would leave the close-on-exec flag: go by way of high
  // numbers.
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, theirs.get(), 1000);
  posix_spawn_file_actions_adddup2(&actions, segment_fd_.get(), 1001);
  posix_spawn_file_actions_adddup2(&actions, 1000, kControlFd);
  posix_spawn_file_actions_adddup2(&actions, 1001, kSegmentFd);
  posix_spawn_file_actions_addclosefrom_np(&actions, kSegmentFd + 1);
  errno = posix_spawn(&server->pid, path.c_str(), &actions, nullptr,
                      pointers(arguments).data(), pointers(environment).data());
  const bool is_spawned = errno == 0;
  posix_spawn_file_actions_destroy(&actions);
  if (!is_spawned) return nullptr;
  server->pidfd = Fd::make([&] {
    return static_cast<int>(syscall(SYS_pidfd_open, server->pid, 0));
  });
  return server;
}

// Has a server take up its work, and hears its greeting. False if it ends
// instead, or says nothing in time.
bool Connection::begin(Server& server, Deadline deadline, Hello* hello) {
  const std::string text = beginning(generation_ + 1);
  const int control = server.control.get();
  const auto sent = send(control, text.data(), text.size(), MSG_NOSIGNAL);
  if (sent == static_cast<ssize_t>(text.size())) {
    pollfd greeting{control, POLLIN, 0};
    while (poll(&greeting, 1, deadline.remainingMs()) < 0 && errno == EINTR) {
    }
    const auto got = recv(control, hello, sizeof *hello, MSG_DONTWAIT);
    if (got == sizeof *hello && hello->magic == kProtocolMagic) return true;
  }
  server.endAndReap();
  return false;
}

// Gets a server to work: the spare, or a new one if it has ended.
int Connection::launch(int timeout_ms) {
  if (watcher_.joinable()) watcher_.join();
  // Nothing of an earlier server is left: it has ended, and so wrote its last.
  segment_->fault = 0;
  segment_->late_error = 0;
  segment_->comm_error = 0;
  segment_->ring.written = 0;
  segment_->ring.read = 0;
  segment_->ring.reader_sleeps = 0;
  segment_->ring.writer_sleeps = 0;
  segment_->ring.closed = 0;
  ring_ = std::make_unique<RingWriter>(&segment_->ring, segment_->ring_data,
                                       kRingBytes, &waits_[kNumReplies]);

  const Deadline deadline = Deadline::in(Milliseconds(timeout_ms));
  Hello hello{};
  auto server = std::exchange(spare_, nullptr);
  if (server == nullptr || !begin(*server, deadline, &hello)) {
    server = spawn();
    if (server == nullptr) {
      fail(kCudaInitializationError,
           "cannot start " + serverPath() + ": " + std::strerror(errno));
      return error_;
    }
    if (!begin(*server, deadline, &hello)) {
      fail(kCudaInitializationError,
           "the proxy server ended, or said nothing in time");
      return error_;
    }
  }
  if (hello.error != 0) {
    server->endAndReap();
    hello.message[sizeof hello.message - 1] = '\0';
    fail(hello.error, hello.message);
    return error_;
  }
  server_devices_.assign(hello.uuids, hello.uuids + hello.num_devices);
  if (devices_.empty()) {
    devices_ = server_devices_;
    num_devices_ = hello.num_devices;
  }
  driver_version_ = hello.driver_version;
  {
    std::lock_guard<std::mutex> lock_server(server_mutex_);
    server_ = server;
  }
  pid_ = server->pid;
  is_lost_ = false;
  ++generation_;
  watcher_ = std::thread([this, server] { watch(server); });
  return 0;
}

// Has the next server start beside the one in use.
void Connection::keepSpare() {
  if (spare_ == nullptr) spare_ = spawn();
}

// Waits for the end of a server, and lets nobody wait for it any more.
void Connection::watch(std::shared_ptr<Server> server) {
  server->waitForEnd(Deadline::never());
  waitpid(server->pid, nullptr, 0);
  pid_ = 0;
  const int fault = segment_->fault;
  is_lost_ =
      true;  // first: recover() looks at it when it has cleared the error
  error_ = fault != 0 ? fault : int{kCudaLaunchFailure};
  State healthy = State::kHealthy;
  state_.compare_exchange_strong(healthy, State::kLost);
  if (const int fd = lost_fd_; fd >= 0) eventfd_write(fd, 1);
  segment_->ring.close();
  for (Reply& reply : segment_->replies) {
    const auto lost = static_cast<uint32_t>(ReplyState::kLost);
    uint32_t state = reply.state.load();
    while (state != static_cast<uint32_t>(ReplyState::kDone) && state != lost) {
      reply.state.compare_exchange_weak(state, lost);
    }
    // Done as well: the server may have died between its answer and its wake.
    futexWakeAll(&reply.state);
  }
}

int Connection::deliver(const CommandWriter& command, uint16_t reply) {
  if (!ring_->put(command.opcode(), reply, command.payload()) || is_lost_) {
    return lossError();
  }
  return 0;
}

// In a fork: the server and the mappings are the parent's.
void Connection::forgetServer() {
  if (state_ == State::kOff) return;
  new (&watcher_) std::thread;  // the other one does not exist here
  had_device_ = false;
  server_.reset();
  spare_.reset();
  ring_.reset();
  if (segment_ != nullptr) {
    munmap(segment_, kSegmentBytes);
    munmap(reinterpret_cast<void*>(kDeviceBase), kDeviceBytes);
  }
  segment_ = nullptr;
  segment_fd_.reset();
  devices_.clear();
  claim_.reset();
  pid_ = 0;
  error_ = 0;
  is_lost_ = false;
  for (auto& wait : waits_) wait = 0;
  freeAllSlots();
  if (const int fd = lost_fd_.exchange(-1); fd >= 0) close(fd);
  state_ = State::kOff;
}

void Connection::tell(ControlMessage message) {
  const auto server = currentServer();
  if (server == nullptr) return;
  send(server->control.get(), &message, sizeof message, MSG_NOSIGNAL);
}

void Connection::kill() {
  if (const auto server = currentServer()) server->endNow();
}

// Without the ring's lock: its holder may be waiting for this very server.
std::shared_ptr<Connection::Server> Connection::currentServer() {
  std::lock_guard<std::mutex> lock(server_mutex_);
  return server_;
}

int Connection::recover(int timeout_ms) {
  if (state_ == State::kOff || state_ == State::kChild)
    return kCudaNotInitialized;
  const State before = state_.exchange(State::kRestoring);
  std::lock_guard<std::mutex> lock(mutex_);
  if (before == State::kHealthy) error_ = int{kCudaLaunchFailure};
  // A new one must find the memory of the device free, so the old one ends
  // first.
  if (server_ != nullptr) {
    server_->endNow();
    if (!server_->waitForEnd(Deadline::in(Milliseconds(timeout_ms)))) {
      fail(kCudaUnknown, "the lost server does not end; its device hangs");
      return error_;
    }
  }
  const bool is_used = is_attached_ || !device_space.blocks().empty() ||
                       !host_space.blocks().empty();
  is_attached_ = false;
  int error = launch(timeout_ms);
  if (error == 0) numberDevices();
  if (error == 0 && is_used) error = attach();
  if (error == 0 && is_used) error = restoreMemory();
  if (error != 0) {
    // One that has ended again may be replaced again.
    state_ = is_lost_ ? State::kLost : State::kFailed;
    return error;
  }
  if (is_used) keepSpare();
  error_ = 0;
  state_ = State::kHealthy;
  if (!is_lost_) return 0;
  error_ = int{kCudaLaunchFailure};  // it has ended in between
  state_ = State::kLost;
  return error_;
}

// To a new server they may have other numbers.
void Connection::numberDevices() {
  CommandWriter command(kNumberDevices);
  for (const DeviceUuid& uuid : devices_) command.put(uuid);
  put(command);
}

int Connection::restoreMemory() {
  for (const Block& block : host_space.blocks()) {
    const auto command =
        CommandWriter(kMapHost).put(block.address).put(block.size_bytes);
    if (const int error = callLocked(command); error != 0) {
      fail(error, "the new server cannot map host memory");
      return error;
    }
  }
  const auto blocks = device_space.blocks();
  for (const Block& block : blocks) {
    const auto command = CommandWriter(kMapMemory)
                             .put(block.address)
                             .put(block.size_bytes)
                             .put(uint8_t{1});
    if (const int error = callWhenFree(command); error != 0) {
      fail(error, "the new server cannot map " +
                      std::to_string(block.size_bytes) +
                      " bytes of device memory at their old address");
      return error;
    }
  }
  // In front of what streams do that do not wait for the default one.
  return callLocked(CommandWriter(kSyncDevice));
}

void Connection::shutdown() {
  if (state_ == State::kOff || state_ == State::kChild) return;
  std::shared_ptr<Server> server, spare;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    spare = std::exchange(spare_, nullptr);
    server = server_;
    if (server == nullptr) return;
    server->control.reset();  // its end of file tells the server to go
    segment_->ring.close();
  }
  if (spare != nullptr) spare->endAndReap();
  if (!server->waitForEnd(Deadline::in(Milliseconds(kEndTimeoutMs))))
    server->endNow();
  if (watcher_.joinable()) watcher_.join();
}

}  // namespace mnemosyne::proxy
