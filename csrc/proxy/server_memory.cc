#include <sys/mman.h>

#include "proxy/server.h"

namespace mnemosyne::proxy {

// NaN in every format of floating-point numbers: what nobody restores is seen.
constexpr unsigned char kLostByte = 0xFF;

int Server::mapMemory(uint64_t address, size_t size_bytes, bool is_lost) {
  AllocationProperties properties{};
  properties.type = 1;                 // CU_MEM_ALLOCATION_TYPE_PINNED
  properties.location = {1, device_};  // CU_MEM_LOCATION_TYPE_DEVICE
  const AccessDescriptor access{{1, device_}, 3};  // read and write
  const auto& driver = *driver_;
  uint64_t handle = 0;
  int error = driver.cuMemCreate(&handle, size_bytes, &properties, 0);
  if (error != 0) return error;
  error = driver.cuMemMap(address, size_bytes, 0, handle, 0);
  if (error == 0)
    error = driver.cuMemSetAccess(address, size_bytes, &access, 1);
  driver.cuMemRelease(handle);  // the mapping keeps it
  if (error == 0 && is_lost) {
    error = driver.cuMemsetD8Async(address, kLostByte, size_bytes, nullptr);
  }
  return error;
}

void Server::executeMemory(uint16_t opcode, CommandReader& reader,
                           Responder responder) {
  const auto& driver = *driver_;
  const auto stagingAt = [this](uint32_t chunk) {
    if (chunk >= kNumStagingChunks)
      throw ProtocolError("no such staging chunk");
    return segment_->staging[chunk];
  };
  switch (opcode) {
    case kMapMemory: {
      const auto address = reader.get<uint64_t>();
      const auto size = reader.get<uint64_t>();
      const int error = mapMemory(address, size, reader.get<uint8_t>() != 0);
      responder.answer(endIfLost(error, "cuMemCreate"));
      break;
    }
    case kUnmapMemory: {
      const auto address = reader.get<uint64_t>();
      check(driver.cuMemUnmap(address, reader.get<uint64_t>()), "cuMemUnmap");
      break;
    }
    case kMapHost: {  // the pages are in the segment already
      const auto address = reader.get<uint64_t>();
      const int error = driver.cuMemHostRegister_v2(
          reinterpret_cast<void*>(address), reader.get<uint64_t>(), 3);
      responder.answer(endIfLost(error, "cuMemHostRegister"));
      break;
    }
    case kUnmapHost: {
      const auto address = reader.get<uint64_t>();
      check(driver.cuMemHostUnregister(reinterpret_cast<void*>(address)),
            "cuMemHostUnregister");
      break;
    }
    case kMemoryInfo: {
      size_t values[2] = {};
      const int error = driver.cuMemGetInfo_v2(&values[0], &values[1]);
      responder.answerWith(endIfLost(error, "cuMemGetInfo"), values);
      break;
    }
    case kCopyInline: {
      void* on = stream(reader.get<uint32_t>());
      const auto to = reader.get<uint64_t>();
      const auto bytes = reader.getBytes();
      // From pageable memory, so the bytes are read before it returns.
      check(driver.cuMemcpyHtoDAsync_v2(to, bytes.data(), bytes.size(), on),
            "cuMemcpyHtoDAsync");
      break;
    }
    case kCopyFromChunk: {
      void* on = stream(reader.get<uint32_t>());
      const auto to = reader.get<uint64_t>();
      const auto chunk = reader.get<uint32_t>();
      const auto size = reader.get<uint64_t>();
      const auto count = reader.get<uint64_t>();
      check(driver.cuMemcpyHtoDAsync_v2(to, stagingAt(chunk), size, on),
            "cuMemcpyHtoDAsync");
      const auto counter =
          reinterpret_cast<uint64_t>(&segment_->chunks_done[chunk]);
      check(driver.cuStreamWriteValue64_v2(on, counter, count, 0),
            "cuStreamWriteValue64");
      break;
    }
    case kCopyToChunk: {
      void* on = stream(reader.get<uint32_t>());
      const auto from = reader.get<uint64_t>();
      const auto chunk = reader.get<uint32_t>();
      const auto size = reader.get<uint64_t>();
      const int error =
          driver.cuMemcpyDtoHAsync_v2(stagingAt(chunk), from, size, on);
      if (error != 0) {
        responder.answer(endIfLost(error, "cuMemcpyDtoHAsync"));
        break;
      }
      later([this, on, responder] {
        const int error = driver_->cuStreamSynchronize(on);
        responder.answer(endIfLost(error, "a copy to the host"));
      });
      break;
    }
    case kCopy: {
      void* on = stream(reader.get<uint32_t>());
      const auto to = reader.get<uint64_t>();
      const auto from = reader.get<uint64_t>();
      check(driver.cuMemcpyAsync(to, from, reader.get<uint64_t>(), on),
            "cuMemcpyAsync");
      break;
    }
    case kFill: {
      void* on = stream(reader.get<uint32_t>());
      const auto address = reader.get<uint64_t>();
      const auto pattern = reader.get<uint32_t>();
      const auto width = reader.get<uint32_t>();
      const auto count = reader.get<uint64_t>();
      const int error =
          width == 1   ? driver.cuMemsetD8Async(address, pattern, count, on)
          : width == 2 ? driver.cuMemsetD16Async(address, pattern, count, on)
                       : driver.cuMemsetD32Async(address, pattern, count, on);
      check(error, "cuMemsetAsync");
      break;
    }
    default:
      throw ProtocolError("no such command: " + std::to_string(opcode));
  }
}

}  // namespace mnemosyne::proxy
