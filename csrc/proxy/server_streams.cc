#include "proxy/server.h"

namespace mnemosyne::proxy {

// 0 to 2 are CUDA's own: default, legacy default, default of the thread.
void* Server::stream(uint32_t id) {
  if (id <= 2) return reinterpret_cast<void*>(static_cast<uintptr_t>(id));
  const auto found = streams_.find(id);
  if (found == streams_.end()) throw ProtocolError("no such stream");
  Stream& stream = found->second;
  if (stream.real == nullptr) {  // torch makes 128 of them, and uses a few
    check(driver_->cuStreamCreateWithPriority(&stream.real, stream.flags,
                                              stream.priority),
          "cuStreamCreateWithPriority");
  }
  return stream.real;
}

void* Server::event(uint32_t id) {
  const auto found = events_.find(id);
  if (found == events_.end()) throw ProtocolError("no such event");
  return found->second;
}

void Server::executeStreams(uint16_t opcode, CommandReader& reader,
                            Responder responder) {
  const auto& driver = *driver_;
  const auto wait = [&](int (*function)(void*), void* object,
                        const char* what) {
    later([this, function, object, what, responder] {
      responder.answer(endIfLost(function(object), what));
    });
  };
  switch (opcode) {
    case kCreateStream: {
      const auto id = reader.get<uint32_t>();
      Stream stream;
      stream.flags = reader.get<uint32_t>();
      stream.priority = reader.get<int32_t>();
      streams_.try_emplace(id, stream);
      break;
    }
    case kDestroyStream: {
      const auto found = streams_.find(reader.get<uint32_t>());
      if (found == streams_.end()) break;
      if (found->second.real != nullptr) {
        check(driver.cuStreamDestroy_v2(found->second.real), "cuStreamDestroy");
      }
      streams_.erase(found);
      break;
    }
    case kSyncStream: {
      void* on = stream(reader.get<uint32_t>());
      const int now = driver.cuStreamQuery(on);
      if (now == kCudaNotReady) {
        wait(driver.cuStreamSynchronize, on, "cuStreamSynchronize");
      } else {
        responder.answer(endIfLost(now, "cuStreamQuery"));
      }
      break;
    }
    case kQueryStream: {
      const int now = driver.cuStreamQuery(stream(reader.get<uint32_t>()));
      responder.answer(endIfLost(now, "cuStreamQuery"));
      break;
    }
    case kSyncDevice:
      later([this, responder] {
        responder.answer(
            endIfLost(driver_->cuCtxSynchronize(), "cuCtxSynchronize"));
      });
      break;
    case kCreateEvent: {
      const auto id = reader.get<uint32_t>();
      if (events_.contains(id)) break;
      void* made = nullptr;
      check(driver.cuEventCreate(&made, reader.get<uint32_t>()),
            "cuEventCreate");
      events_.emplace(id, made);
      break;
    }
    case kDestroyEvent: {
      const auto found = events_.find(reader.get<uint32_t>());
      if (found == events_.end()) break;
      check(driver.cuEventDestroy_v2(found->second), "cuEventDestroy");
      events_.erase(found);
      break;
    }
    case kRecordEvent: {
      const auto id = reader.get<uint32_t>();
      void* on = stream(reader.get<uint32_t>());
      const auto count = reader.get<uint64_t>();
      if (id >= kMaxEvents) throw ProtocolError("no such event");
      check(driver.cuEventRecord(event(id), on), "cuEventRecord");
      // So that a query costs the client no call.
      const auto counter =
          reinterpret_cast<uint64_t>(&segment_->events_reached[id]);
      check(driver.cuStreamWriteValue64_v2(on, counter, count, 0),
            "cuStreamWriteValue64");
      break;
    }
    case kWaitEvent: {
      void* on = stream(reader.get<uint32_t>());
      check(driver.cuStreamWaitEvent(on, event(reader.get<uint32_t>()), 0),
            "cuStreamWaitEvent");
      break;
    }
    case kQueryEvent: {
      const int now = driver.cuEventQuery(event(reader.get<uint32_t>()));
      responder.answer(endIfLost(now, "cuEventQuery"));
      break;
    }
    case kSyncEvent:
      wait(driver.cuEventSynchronize, event(reader.get<uint32_t>()),
           "cuEventSynchronize");
      break;
    case kElapsedTime: {
      float milliseconds = 0;
      void* from = event(reader.get<uint32_t>());
      void* to = event(reader.get<uint32_t>());
      const int error = driver.cuEventElapsedTime_v2(&milliseconds, from, to);
      responder.answerWith(endIfLost(error, "cuEventElapsedTime"),
                           milliseconds);
      break;
    }
    default:
      throw ProtocolError("no such command: " + std::to_string(opcode));
  }
}

}  // namespace mnemosyne::proxy
