// Streams and events.
#include <array>
#include <atomic>
#include <vector>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

Connection& connection() { return Connection::instance(); }

// An event has a counter in the segment that the device raises; the counters
// are used again, and count on from where they are.
class EventCounters {
 public:
  int take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      const int slot = free_.back();
      free_.pop_back();
      return slot;
    }
    return num_used_ < static_cast<int>(kMaxEvents) ? num_used_++ : -1;
  }
  void give(int slot) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(slot);
  }
  uint64_t next(int slot) { return ++issued_[slot]; }

 private:
  std::mutex mutex_;
  std::vector<int> free_;
  int num_used_ = 0;
  std::array<std::atomic<uint64_t>, kMaxEvents> issued_{};
};

EventCounters& counters() {
  static auto* counters = new EventCounters;
  return *counters;
}

class Event final : public Handle {
 public:
  Event(uint32_t slot, unsigned flags) : Handle(slot), flags_(flags) {}

  int record(void* stream) {
    const uint64_t count = counters().next(id());
    const int error = connection().post(CommandWriter(kRecordEvent)
                                            .put(id())
                                            .put(streamNumber(stream))
                                            .put(count),
                                        {this, streamOf(stream)});
    if (error == 0) {
      recorded_in_ = connection().generation();
      count_ = count;
    }
    return error;
  }

  // Records of a lost server are done: what they stood behind will never be.
  // What is done stays so, though a late record on another stream, of an event
  // that had the counter before, may still lower it.
  bool isPending() {
    const uint64_t count = count_;
    if (count <= done_ || recorded_in_ != connection().generation()) {
      return false;
    }
    if (connection().segment()->events_reached[id()].load() < count)
      return true;
    done_ = count;
    return false;
  }

  // Its time went with a lost server.
  bool hasLostTime() const {
    return recorded_in_ != 0 && recorded_in_ != connection().generation();
  }

  int query() {
    if (!isPending()) return 0;
    // Records on two streams may raise the counter in another order than they
    // were made, and then only the device knows.
    return ++num_queries_ % 64 == 0 ? ask(kQueryEvent) : int{kCudaNotReady};
  }
  int sync() { return isPending() ? ask(kSyncEvent) : 0; }

 private:
  // The device says so in front of the write behind the record.
  int ask(Opcode opcode) {
    const uint64_t count = count_;
    const int result =
        connection().call(CommandWriter(opcode).put(id()), nullptr, {this});
    if (result == 0) done_ = count;
    return result;
  }

  void define(Connection& connection) override {
    connection.put(CommandWriter(kCreateEvent).put(id()).put(uint32_t{flags_}));
  }

  const unsigned flags_;
  std::atomic<uint64_t> count_{0}, done_{0}, recorded_in_{0};
  std::atomic<uint32_t> num_queries_{0};
};

Event* eventOf(void* event) { return static_cast<Event*>(event); }

}  // namespace

Stream::Stream(unsigned flags, int priority)
    : Handle(nextId()), flags(flags), priority(priority) {}

void Stream::define(Connection& connection) {
  connection.put(CommandWriter(kCreateStream)
                     .put(id())
                     .put(uint32_t{flags})
                     .put(int32_t{priority}));
}

int syncStream(void* stream) {
  return connection().call(CommandWriter(kSyncStream).put(streamNumber(stream)),
                           nullptr, {streamOf(stream)});
}

}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT int cudaStreamCreateWithPriority(void** stream, unsigned flags,
                                                  int priority) {
  *stream = new Stream(flags, priority);
  return 0;
}

MNEMOSYNE_EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

MNEMOSYNE_EXPORT int cudaStreamCreate(void** stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

MNEMOSYNE_EXPORT int cudaStreamDestroy(void* stream) {
  Stream* record = streamOf(stream);
  if (record == nullptr) return report(kCudaInvalidHandle);
  auto& connection = Connection::instance();
  if (connection.isUsable()) {
    connection.post(CommandWriter(kDestroyStream).put(record->id()));
  }
  delete record;
  return 0;
}

MNEMOSYNE_EXPORT int cudaStreamSynchronize(void* stream) {
  return report(syncStream(stream));
}

MNEMOSYNE_EXPORT int cudaStreamQuery(void* stream) {
  if (onlyBooks()) return 0;
  const int code = Connection::instance().call(
      CommandWriter(kQueryStream).put(streamNumber(stream)), nullptr,
      {streamOf(stream)});
  return code == kCudaNotReady ? code : report(code);
}

MNEMOSYNE_EXPORT int cudaStreamGetPriority(void* stream, int* priority) {
  const Stream* record = streamOf(stream);
  *priority = record == nullptr ? 0 : record->priority;
  return 0;
}

MNEMOSYNE_EXPORT int cudaStreamGetFlags(void* stream, unsigned* flags) {
  const Stream* record = streamOf(stream);
  *flags = record == nullptr ? 0 : record->flags;
  return 0;
}

MNEMOSYNE_EXPORT int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
  if (onlyBooks() || !eventOf(event)->isPending()) return 0;
  return report(
      Connection::instance().post(CommandWriter(kWaitEvent)
                                      .put(streamNumber(stream))
                                      .put(eventOf(event)->id()),
                                  {streamOf(stream), eventOf(event)}));
}

// Nothing is ever captured: graphs are refused.
MNEMOSYNE_EXPORT int cudaStreamIsCapturing(void*, int* status) {
  *status = 0;
  return 0;
}

MNEMOSYNE_EXPORT int cudaStreamGetCaptureInfo(void*, int* status, uint64_t*,
                                              void*, void*, void*, void*) {
  *status = 0;
  return 0;
}

MNEMOSYNE_EXPORT int cudaThreadExchangeStreamCaptureMode(int*) { return 0; }

MNEMOSYNE_EXPORT int cudaEventCreateWithFlags(void** event, unsigned flags) {
  const int slot = counters().take();
  if (slot < 0) return report(kCudaOutOfMemory);
  *event = new Event(slot, flags);
  return 0;
}

MNEMOSYNE_EXPORT int cudaEventCreate(void** event) {
  return cudaEventCreateWithFlags(event, 0);
}

MNEMOSYNE_EXPORT int cudaEventDestroy(void* event) {
  auto& connection = Connection::instance();
  Event* record = eventOf(event);
  if (record == nullptr) return report(kCudaInvalidHandle);
  const uint32_t slot = record->id();
  if (connection.isUsable()) {
    connection.post(CommandWriter(kDestroyEvent).put(slot));
  }
  delete record;
  counters().give(slot);
  return 0;
}

MNEMOSYNE_EXPORT int cudaEventRecordWithFlags(void* event, void* stream,
                                              unsigned) {
  if (onlyBooks()) return 0;
  const int error = eventOf(event)->record(stream);
  return onlyBooks() ? 0 : report(error);
}

MNEMOSYNE_EXPORT int cudaEventRecord(void* event, void* stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

MNEMOSYNE_EXPORT int cudaEventQuery(void* event) {
  if (onlyBooks()) return 0;
  const int code = eventOf(event)->query();
  if (code == 0 || code == kCudaNotReady) return code;
  return onlyBooks() ? 0 : report(code);
}

MNEMOSYNE_EXPORT int cudaEventSynchronize(void* event) {
  // Unlike a query it is a place where a program expects the errors of its
  // device.
  if (!Connection::instance().isUsable() && onlyBooks()) {
    return report(Connection::instance().error());
  }
  return report(eventOf(event)->sync());
}

MNEMOSYNE_EXPORT int cudaEventElapsedTime(float* milliseconds, void* from,
                                          void* to) {
  *milliseconds = 0;
  if (onlyBooks() || eventOf(from)->hasLostTime() ||
      eventOf(to)->hasLostTime()) {
    return 0;
  }
  Answer answer{milliseconds, sizeof *milliseconds};
  return report(Connection::instance().call(CommandWriter(kElapsedTime)
                                                .put(eventOf(from)->id())
                                                .put(eventOf(to)->id()),
                                            &answer,
                                            {eventOf(from), eventOf(to)}));
}
