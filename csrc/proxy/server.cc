#include "proxy/server.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mnemosyne::proxy {
// After these "the process must be terminated and relaunched" (driver_types.h),
// or the device needs more than that.
bool endsDevice(int code) {
  switch (code) {
    case 46:   // device unavailable
    case 214:  // uncorrectable ECC error
    case 220:  // NVLink error
    case 226:  // contained error
    case 700:
    case 702:
    case 710:
    case 714:
    case 715:
    case 716:
    case 717:
    case 718:
    case 719:
    case 721:
    case 810:
    case 911:
    case 999:
      return true;
    default:
      return false;
  }
}

void Responder::answer(int result, const void* data, size_t size_bytes) const {
  if (slot_ >= kNumReplies) return;
  Reply& reply = segment_->replies[slot_];
  reply.result = result;
  reply.size_bytes = std::min(size_bytes, sizeof reply.data);
  if (reply.size_bytes > 0) std::memcpy(reply.data, data, reply.size_bytes);
  const uint32_t before =
      reply.state.exchange(static_cast<uint32_t>(ReplyState::kDone));
  if (before == static_cast<uint32_t>(ReplyState::kAwaited))
    futexWakeAll(&reply.state);
}

Server::Server(SegmentHead* segment, std::string emulated)
    : segment_(segment),
      libraries_(std::move(emulated)),
      waiters_([this] { enterThread(); }) {}

void Server::enterThread() {
  if (context_ != nullptr) driver_->cuCtxSetCurrent(context_);
}

void Server::load(bool all) {
  try {
    driver_ = std::make_unique<Driver>(libraries_);
    if (all) libraries_.openAll();
  } catch (const MissingLibrary&) {  // said when it is needed
  }
}

Hello Server::hello() {
  Hello hello{};
  hello.magic = kProtocolMagic;
  const auto fail = [&](int error, const std::string& message) {
    hello.error = error;
    std::snprintf(hello.message, sizeof hello.message, "%s", message.c_str());
  };
  try {
    if (driver_ == nullptr) driver_ = std::make_unique<Driver>(libraries_);
    if (const int error = driver_->cuInit(0); error != 0) {
      fail(error, "cuInit gives error " + std::to_string(error));
    } else if (const int error = driver_->cuDeviceGetCount(&hello.num_devices);
               error != 0) {
      fail(error, "cuDeviceGetCount gives error " + std::to_string(error));
    }
    driver_->cuDriverGetVersion(&hello.driver_version);
    hello.num_devices = std::min<int>(hello.num_devices, kMaxDevices);
    for (int device = 0; device < hello.num_devices; ++device) {
      driver_->cuDeviceGetUuid_v2(&hello.uuids[device], device);
    }
    uuids_.assign(hello.uuids, hello.uuids + hello.num_devices);
    numbers_ = uuids_;
  } catch (const MissingLibrary& missing) {
    fail(kCudaNoDevice, missing.what());
  }
  return hello;
}

void Server::run() {
  RingReader ring(&segment_->ring, segment_->ring_data, kRingBytes);
  while (const auto record = ring.next()) {
    execute(*record);
    ring.release();
  }
}

void Server::execute(const Record& record) {
  CommandReader reader(record.payload);
  const Responder responder(segment_, record.reply);
  const uint16_t opcode = record.opcode;
  try {
    if (opcode >= kFirstForward) {
      std::lock_guard<std::mutex> lock(comms_mutex_);
      if (!executeGenerated(opcode, reader, *this)) {
        throw ProtocolError("no such command: " + std::to_string(opcode));
      }
    } else if (opcode >= kDestroyCublas) {
      executeLibraries(opcode, reader, responder);
    } else if (opcode >= kLoadLibrary) {
      executeKernels(opcode, reader, responder);
    } else if (opcode >= kCreateStream) {
      executeStreams(opcode, reader, responder);
    } else if (opcode >= kMapMemory) {
      executeMemory(opcode, reader, responder);
    } else {
      executeQuery(opcode, reader, responder);
    }
  } catch (const MissingLibrary& missing) {
    std::fprintf(stderr, "mnemosyne-proxy: %s\n", missing.what());
    check(kCudaNotSupported, "a missing library");
    responder.answer(kCudaNotSupported);
  }
}

void Server::executeQuery(uint16_t opcode, CommandReader& reader,
                          Responder responder) {
  switch (opcode) {
    case kAttach: {
      AttachReply reply{};
      const int device = ordinalOf(reader.get<DeviceUuid>());
      responder.answerWith(attach(device, &reply), reply);
      break;
    }
    case kNumberDevices:
      numbers_.clear();
      while (!reader.atEnd()) numbers_.push_back(reader.get<DeviceUuid>());
      break;
    case kDeviceProperties: {
      std::vector<std::byte> properties(kDevicePropertiesBytes);
      auto* get = libraries_.function<int(void*, int)>(
          Library::kCudart, "cudaGetDeviceProperties");
      const int device = ordinal(reader.get<int32_t>());
      const int result = get(properties.data(), device);
      responder.answer(result, properties.data(), properties.size());
      break;
    }
    case kDeviceAttribute: {
      int value = 0;
      const auto attribute = reader.get<int32_t>();
      const int device = ordinal(reader.get<int32_t>());
      responder.answerWith(
          driver_->cuDeviceGetAttribute(&value, attribute, device), value);
      break;
    }
    case kDevicePciBusId: {
      char text[32] = {};
      const int device = ordinal(reader.get<int32_t>());
      responder.answerWith(
          driver_->cuDeviceGetPCIBusId(text, sizeof text, device), text);
      break;
    }
    case kDeviceUuid: {
      char uuid[16] = {};
      const int device = ordinal(reader.get<int32_t>());
      responder.answerWith(driver_->cuDeviceGetUuid_v2(uuid, device), uuid);
      break;
    }
    default:
      throw ProtocolError("no such command: " + std::to_string(opcode));
  }
}

// The driver's number of a device; -1 if it is gone.
int Server::ordinalOf(const DeviceUuid& uuid) const {
  const auto found = std::ranges::find(uuids_, uuid);
  return found == uuids_.end() ? -1 : found - uuids_.begin();
}

// The same, of what is the client's `device`.
int Server::ordinal(int device) const {
  if (device < 0 || static_cast<size_t>(device) >= numbers_.size()) return -1;
  return ordinalOf(numbers_[device]);
}

int Server::attach(int device, AttachReply* reply) {
  if (device < 0) return kCudaNoDevice;
  int major = 0, minor = 0;
  size_t total = 0;
  uint64_t base = 0;
  constexpr int kMajor = 75,
                kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  constexpr unsigned kPortableMapped = 3;
  const auto& driver = *driver_;
  int error = driver.cuDevicePrimaryCtxRetain(&context_, device);
  if (error == 0) error = driver.cuCtxSetCurrent(context_);
  if (error == 0) error = driver.cuDeviceGetAttribute(&major, kMajor, device);
  if (error == 0) error = driver.cuDeviceGetAttribute(&minor, kMinor, device);
  if (error == 0) error = driver.cuDeviceTotalMem_v2(&total, device);
  if (error == 0) {
    error = driver.cuCtxGetStreamPriorityRange(
        &reply->least_stream_priority, &reply->greatest_stream_priority);
  }
  // A wish, not an order, says cuda.h; so the client looks at what it gets.
  if (error == 0) {
    error = driver.cuMemAddressReserve(&base, kDeviceBytes, kDeviceGranularity,
                                       kDeviceBase, 0);
  }
  // What the device itself writes and reads of the head.
  if (error == 0) {
    error = driver.cuMemHostRegister_v2(segment_->events_reached,
                                        sizeof segment_->events_reached,
                                        kPortableMapped);
  }
  if (error == 0) {
    error = driver.cuMemHostRegister_v2(
        segment_->chunks_done, sizeof segment_->chunks_done, kPortableMapped);
  }
  if (error == 0) {
    error = driver.cuMemHostRegister_v2(
        segment_->staging, sizeof segment_->staging, kPortableMapped);
  }
  if (error != 0) return error;
  device_ = device;
  reply->device_base = base;
  reply->total_bytes = total;
  reply->compute_capability = major * 10 + minor;
  return 0;
}

void Server::later(std::function<void()> work) {
  waiters_.run(std::move(work));
}

int Server::endIfLost(int code, const char* what) {
  if (!endsDevice(code)) return code;
  const char* name = nullptr;
  driver_->cuGetErrorName(code, &name);
  std::fprintf(stderr, "mnemosyne-proxy: device lost: %s (%d) from %s\n",
               name == nullptr ? "unknown error" : name, code, what);
  int none = 0;
  segment_->fault.compare_exchange_strong(none, code);
  _exit(70);
}

void Server::check(int code, const char* what) {
  if (code == 0) return;
  endIfLost(code, what);
  int none = 0;
  if (segment_->late_error.compare_exchange_strong(none, code)) {
    std::fprintf(stderr, "mnemosyne-proxy: error %d from %s\n", code, what);
  }
}

void* Server::symbol(Library library, const char* name) {
  return libraries_.symbol(library, name);
}

}  // namespace mnemosyne::proxy
