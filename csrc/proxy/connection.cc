#include "proxy/connection.h"

#include <pthread.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

#include "proxy/device_claim.h"

namespace mnemosyne::proxy {

namespace {

constexpr int kStartTimeoutMs = 120'000;
// How long a device may take to give back the memory of a process that ended.
constexpr int kFreeTimeoutMs = 10'000;
constexpr Milliseconds kFreePoll{10};

// Whether a program's own progress, and nothing else, leads to this command.
bool isOfTheProgram(uint16_t opcode) {
  switch (opcode) {
    case kAttach:
    case kNumberDevices:
    case kMapMemory:
    case kUnmapMemory:
    case kMapHost:
    case kUnmapHost:
    case kMemoryInfo:
    case kCreateStream:
    case kQueryStream:
    case kCreateEvent:
    case kQueryEvent:
    case kSyncEvent:
    case kLoadLibrary:
    case kLoadKernel:
    case kSetKernelAttribute:
    case kKernelParameters:
    case kNcclErrors:
      return false;
    default:
      return true;
  }
}

}  // namespace

Connection& Connection::instance() {
  static Connection* connection = [] {
    auto* made = new Connection;
    // Nobody of ours may hold the locks while the process is copied; the child
    // has no server, and must not speak to its parent's.
    pthread_atfork([] { instance().mutex_.lock(); },
                   [] { instance().mutex_.unlock(); },
                   [] {
                     auto& child = instance();
                     // One that only counts devices leaves the child free to
                     // use one.
                     if (child.is_attached_) {
                       child.state_ = State::kChild;
                     } else {
                       child.forgetServer();
                     }
                     child.mutex_.unlock();
                   });
    return made;
  }();
  return *connection;
}

Connection::Connection() { freeAllSlots(); }

void Connection::freeAllSlots() {
  free_slots_.clear();
  for (size_t slot = kNumReplies; slot > 0; --slot)
    free_slots_.push_back(slot - 1);
}

int Connection::start() {
  if (state_ == State::kHealthy) return 0;
  std::lock_guard<std::mutex> lock(mutex_);
  return startLocked(kStartTimeoutMs);
}

int Connection::use() {
  const State state = state_.load();
  if (state != State::kHealthy && state != State::kOff) return lossError();
  std::lock_guard<std::mutex> lock(mutex_);
  return prepare(kMapMemory, {});
}

int Connection::define(Handle* handle) {
  const State state = state_.load();
  if (state != State::kHealthy && state != State::kOff) return lossError();
  std::lock_guard<std::mutex> lock(mutex_);
  return prepare(kMapMemory, {handle});
}

void Connection::rest() {
  if (state_ != State::kHealthy || is_attached_) return;
  shutdown();
  std::lock_guard<std::mutex> lock(mutex_);
  forgetServer();
}

bool Connection::choose(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_attached_ && chosen_device != device) return false;
  chosen_device = device;
  return true;
}

// Everything that must stand in front of a command; 0 if it may be sent.
int Connection::prepare(uint16_t opcode, std::initializer_list<Handle*> needs) {
  if (const int error = startLocked(kStartTimeoutMs); error != 0) return error;
  if (is_lost_) return lossError();
  if (!is_attached_ && opcode >= kMapMemory) {
    if (const int error = attach(); error != 0) return error;
    keepSpare();
  }
  for (Handle* handle : needs) need(handle);
  return 0;
}

int Connection::attachTo(const DeviceUuid& device) {
  Answer answer{&device_, sizeof device_};
  const auto command = CommandWriter(kAttach).put(device);
  return had_device_ ? callWhenFree(command, &answer)
                     : callLocked(command, &answer);
}

// Takes the chosen device into use. If a server before had it and it is gone,
// another one takes its place, and its number.
int Connection::attach() {
  const size_t chosen = chosen_device;
  if (chosen >= devices_.size()) return kCudaInvalidDevice;
  // Whoever puts two processes on one device may do so.
  if (!claim_) claim_ = claimDevice(devices_[chosen]);
  int error = attachTo(devices_[chosen]);
  const bool may_be_gone = error != 0 && error != kCudaOutOfMemory;
  if (may_be_gone && had_device_ && attachToAnother()) error = 0;
  if (error != 0) {
    fail(error,
         "the device gives error " + std::to_string(error) + " at its start");
    return error;
  }
  if (device_.device_base != kDeviceBase) {
    fail(kCudaInitializationError,
         "the driver gives another address range than the one that was asked "
         "for, so "
         "pointers would not outlive a server");
    return error_;
  }
  is_attached_ = had_device_ = true;
  return 0;
}

bool Connection::attachToAnother() {
  for (const DeviceUuid& another : server_devices_) {
    Fd claim = claimDevice(another);
    if (!claim || attachTo(another) != 0) continue;
    claim_ = std::move(claim);
    std::fprintf(stderr,
                 "mnemosyne: device proxy: device %d is gone; another one of "
                 "this machine takes its place\n",
                 chosen_device.load());
    devices_[chosen_device] = another;
    numberDevices();
    return true;
  }
  return false;
}

void Connection::need(Handle* handle) {
  if (handle == nullptr || handle->generation_ == generation_) return;
  handle->generation_ = generation_;
  handle->define(*this);
}

void Connection::trace(const CommandWriter& command) {
  if (!isOfTheProgram(command.opcode())) return;
  constexpr uint64_t kPrime = 0x100000001b3;  // of FNV-1a
  const uint64_t what =
      command.opcode() + (uint64_t{command.payload().size()} << 16);
  trace_ = (trace_ ^ what) * kPrime + 1;
}

uint64_t Connection::takeTrace() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_traced_ = true;
  return std::exchange(trace_, 0);
}

int Connection::submit(const CommandWriter& command, uint16_t reply) {
  num_commands_.add(1);
  num_bytes_.add(command.payload().size());
  if (is_traced_.load(std::memory_order_relaxed)) trace(command);
  return deliver(command, reply);
}

int Connection::put(const CommandWriter& command) {
  return submit(command, kNoReply);
}

int Connection::takeLateError() {
  if (segment_->late_error.load(std::memory_order_relaxed) == 0) return 0;
  return segment_->late_error.exchange(0);
}

int Connection::post(const CommandWriter& command,
                     std::initializer_list<Handle*> needs) {
  // Not under the lock: whoever recovers holds it.
  const State state = state_.load();
  if (state != State::kHealthy && state != State::kOff) return lossError();
  std::lock_guard<std::mutex> lock(mutex_);
  if (const int error = prepare(command.opcode(), needs); error != 0)
    return error;
  if (const int error = put(command); error != 0) return error;
  return takeLateError();
}

uint16_t Connection::takeSlot() {
  std::unique_lock<std::mutex> lock(slots_mutex_);
  slot_freed_.wait(lock, [this] { return !free_slots_.empty(); });
  const uint16_t slot = free_slots_.back();
  free_slots_.pop_back();
  segment_->replies[slot].state = static_cast<uint32_t>(ReplyState::kPending);
  return slot;
}

void Connection::giveSlot(uint16_t slot) {
  {
    std::lock_guard<std::mutex> lock(slots_mutex_);
    free_slots_.push_back(slot);
  }
  slot_freed_.notify_one();
}

// Waits for the answer in `slot`, and frees it.
int Connection::await(uint16_t slot, Answer* answer) {
  Reply& reply = segment_->replies[slot];
  // Over before another thread may have the slot.
  std::optional<Waiting> waiting(std::in_place, waits_[slot]);
  const auto pending = static_cast<uint32_t>(ReplyState::kPending);
  const auto awaited = static_cast<uint32_t>(ReplyState::kAwaited);
  uint32_t state = reply.state.load();
  for (int spins = 0; state == pending || state == awaited; ++spins) {
    if (spins < numSpins()) {
      pauseSpin();
    } else if (state == awaited ||
               reply.state.compare_exchange_strong(state, awaited)) {
      futexWait(&reply.state, awaited);
    }
    state = reply.state.load();
  }
  int result = lossError();
  if (state == static_cast<uint32_t>(ReplyState::kDone)) {
    result = reply.result;
    if (answer != nullptr) {
      answer->got_bytes = std::min<size_t>(reply.size_bytes, sizeof reply.data);
      const size_t size = std::min(answer->got_bytes, answer->size_bytes);
      if (size > 0) std::memcpy(answer->data, reply.data, size);
    }
  }
  waiting.reset();
  giveSlot(slot);
  return result;
}

int Connection::callLocked(const CommandWriter& command, Answer* answer) {
  num_calls_.add(1);
  const uint16_t slot = takeSlot();
  if (const int error = submit(command, slot); error != 0) {
    giveSlot(slot);
    return error;
  }
  return await(slot, answer);
}

// As callLocked(), for what a new server takes of its device: the driver may
// give back the memory of the old one a while after its end.
int Connection::callWhenFree(const CommandWriter& command, Answer* answer) {
  const Deadline deadline = Deadline::in(Milliseconds(kFreeTimeoutMs));
  for (;;) {
    const int error = callLocked(command, answer);
    if (error != kCudaOutOfMemory || deadline.expired()) return error;
    std::this_thread::sleep_for(kFreePoll);
  }
}

int Connection::call(const CommandWriter& command, Answer* answer,
                     std::initializer_list<Handle*> needs) {
  const State state = state_.load();
  if (state != State::kHealthy && state != State::kOff) return lossError();
  uint16_t slot;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (const int error = prepare(command.opcode(), needs); error != 0)
      return error;
    num_calls_.add(1);
    slot = takeSlot();
    if (const int error = submit(command, slot); error != 0) {
      giveSlot(slot);
      return error;
    }
  }
  const int result = await(slot, answer);
  const int late = takeLateError();
  return result != 0 ? result : late;
}

void Connection::fail(int error, const std::string& message) {
  error_ = error != 0 ? error : int{kCudaInitializationError};
  state_ = State::kFailed;
  std::lock_guard<std::mutex> lock(message_mutex_);
  message_ = message;
  std::fprintf(stderr, "mnemosyne: device proxy: %s\n", message.c_str());
}

double Connection::waitingSeconds() const {
  const int64_t now = nowNs();
  int64_t first = now;
  for (const auto& began : waits_) {
    if (const int64_t at = began; at != 0) first = std::min(first, at);
  }
  return static_cast<double>(now - first) * 1e-9;
}

int Connection::lostFd() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (lost_fd_ < 0) lost_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (is_lost_) eventfd_write(lost_fd_, 1);
  return lost_fd_;
}

std::string Connection::message() {
  std::lock_guard<std::mutex> lock(message_mutex_);
  return message_;
}

}  // namespace mnemosyne::proxy
