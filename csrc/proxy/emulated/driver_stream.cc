// The driver: streams and events.
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>

#include "proxy/emulated/driver.h"

namespace mnemosyne::proxy::emulated {
namespace {

constexpr unsigned kNonBlocking = 1;    // CU_STREAM_NON_BLOCKING
constexpr unsigned kDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING

// One recording of an event. Whoever waits for it keeps it, while the event may
// be recorded again.
struct Recording {
  Point point;
  std::atomic<int64_t> nanoseconds = 0;
};

struct Event {
  bool has_time;
  std::shared_ptr<Recording> recording;  // null before the first
};

// The events by their handles. Its mutex is locked before the device's.
std::mutex events_mutex;
uintptr_t next_event = 0x1000;
std::map<void*, Event>& events() {
  static auto* const all = new std::map<void*, Event>;
  return *all;
}

// The last recording of an event, or null.
int recordingOf(void* handle, std::shared_ptr<Recording>* recording,
                bool* has_time = nullptr) {
  if (const int error = contextError()) return error;
  std::lock_guard<std::mutex> lock(events_mutex);
  const auto found = events().find(handle);
  if (found == events().end()) return kCudaInvalidHandle;
  *recording = found->second.recording;
  if (has_time != nullptr) *has_time = found->second.has_time;
  return kCudaSuccess;
}

int64_t nanosecondsNow() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

template <typename T>
int writeValue(void* stream, uint64_t address, T value) {
  if (const int error = contextError()) return error;
  Memory& memory = device()->memory();
  if (address % sizeof(T) != 0 || (!memory.isDevice(address, sizeof(T)) &&
                                   !memory.isRegistered(address, sizeof(T)))) {
    return kCudaInvalidValue;
  }
  Operation operation;
  operation.body = [=]() -> int {
    __atomic_store_n(reinterpret_cast<T*>(address), value, __ATOMIC_RELEASE);
    return kCudaSuccess;
  };
  return device()->submit(stream, std::move(operation));
}

}  // namespace
}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int cuStreamCreateWithPriority(void** stream, unsigned flags,
                                                int /*priority*/) {
  if (const int error = contextError()) return error;
  if (flags > kNonBlocking) return kCudaInvalidValue;
  *stream = device()->createStream(flags != kNonBlocking);
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuStreamDestroy_v2(void* stream) {
  if (const int error = contextError()) return error;
  return device()->destroyStream(stream);
}

MNEMOSYNE_EXPORT int cuStreamSynchronize(void* stream) {
  if (const int error = contextError()) return error;
  std::vector<Point> points;
  if (const int error = device()->pointsOf(stream, &points)) return error;
  return device()->wait(points);
}

MNEMOSYNE_EXPORT int cuStreamQuery(void* stream) {
  if (const int error = contextError()) return error;
  std::vector<Point> points;
  if (const int error = device()->pointsOf(stream, &points)) return error;
  for (const Point& point : points) {
    if (!point.isReached()) return kCudaNotReady;
  }
  return device()->error();
}

MNEMOSYNE_EXPORT int cuStreamWaitEvent(void* stream, void* event,
                                       unsigned /*flags*/) {
  std::shared_ptr<Recording> recording;
  if (const int error = recordingOf(event, &recording)) return error;
  Operation operation;
  operation.body = [] { return kCudaSuccess; };
  if (recording != nullptr) operation.after.push_back(recording->point);
  return device()->submit(stream, std::move(operation));
}

MNEMOSYNE_EXPORT int cuStreamWriteValue64_v2(void* stream, CuDevicePtr address,
                                             uint64_t value,
                                             unsigned /*flags*/) {
  return writeValue(stream, address, value);
}

MNEMOSYNE_EXPORT int cuStreamWriteValue32_v2(void* stream, CuDevicePtr address,
                                             uint32_t value,
                                             unsigned /*flags*/) {
  return writeValue(stream, address, value);
}

MNEMOSYNE_EXPORT int cuLaunchHostFunc(void* stream, void (*function)(void*),
                                      void* argument) {
  if (const int error = contextError()) return error;
  if (function == nullptr) return kCudaInvalidValue;
  Operation operation;
  operation.body = [=]() -> int {
    function(argument);
    return kCudaSuccess;
  };
  return device()->submit(stream, std::move(operation));
}

MNEMOSYNE_EXPORT int cuEventCreate(void** event, unsigned flags) {
  if (const int error = contextError()) return error;
  std::lock_guard<std::mutex> lock(events_mutex);
  // Never the same number again: a stale handle is found out.
  *event = reinterpret_cast<void*>(next_event += 0x10);
  events()[*event] = {(flags & kDisableTiming) == 0, nullptr};
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuEventDestroy_v2(void* event) {
  if (const int error = contextError()) return error;
  std::lock_guard<std::mutex> lock(events_mutex);
  return events().erase(event) > 0 ? kCudaSuccess : kCudaInvalidHandle;
}

MNEMOSYNE_EXPORT int cuEventRecord(void* event, void* stream) {
  if (const int error = contextError()) return error;
  std::lock_guard<std::mutex> lock(events_mutex);
  const auto found = events().find(event);
  if (found == events().end()) return kCudaInvalidHandle;
  auto recording = std::make_shared<Recording>();
  Operation operation;
  operation.body = [recording]() -> int {
    recording->nanoseconds = nanosecondsNow();
    return kCudaSuccess;
  };
  const int error =
      device()->submit(stream, std::move(operation), &recording->point);
  if (error == kCudaSuccess) found->second.recording = std::move(recording);
  return error;
}

MNEMOSYNE_EXPORT int cuEventRecordWithFlags(void* event, void* stream,
                                            unsigned /*flags*/) {
  return cuEventRecord(event, stream);
}

MNEMOSYNE_EXPORT int cuEventQuery(void* event) {
  std::shared_ptr<Recording> recording;
  if (const int error = recordingOf(event, &recording)) return error;
  if (recording != nullptr && !recording->point.isReached()) {
    return kCudaNotReady;
  }
  return device()->error();
}

MNEMOSYNE_EXPORT int cuEventSynchronize(void* event) {
  std::shared_ptr<Recording> recording;
  if (const int error = recordingOf(event, &recording)) return error;
  if (recording != nullptr) recording->point.wait();
  return device()->error();
}

MNEMOSYNE_EXPORT int cuEventElapsedTime_v2(float* milliseconds, void* begin,
                                           void* end) {
  std::shared_ptr<Recording> recordings[2];
  bool has_time[2];
  void* const handles[2] = {begin, end};
  for (int i = 0; i < 2; ++i) {
    if (const int error =
            recordingOf(handles[i], &recordings[i], &has_time[i])) {
      return error;
    }
    if (!has_time[i] || recordings[i] == nullptr) return kCudaInvalidHandle;
  }
  for (const auto& recording : recordings) {
    if (!recording->point.isReached()) return kCudaNotReady;
  }
  const int64_t nanoseconds =
      recordings[1]->nanoseconds - recordings[0]->nanoseconds;
  *milliseconds = static_cast<float>(nanoseconds) / 1e6f;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuEventElapsedTime(float* milliseconds, void* begin,
                                        void* end) {
  return cuEventElapsedTime_v2(milliseconds, begin, end);
}
