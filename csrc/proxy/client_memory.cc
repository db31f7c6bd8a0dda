// Memory: where it lies is decided here, what lies there is the server's.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

Connection& connection() { return Connection::instance(); }

enum class Place { kPageable, kPinned, kDevice };

Place placeOf(const void* address) {
  const auto at = reinterpret_cast<uint64_t>(address);
  if (connection().device_space.inRange(at)) return Place::kDevice;
  return connection().host_space.inRange(at) ? Place::kPinned
                                             : Place::kPageable;
}

// The pieces of shared memory through which copies from and to pageable memory
// go. A piece may be taken again once the device has passed it.
class Staging {
 public:
  // The number of a free chunk; waits for one that is in use.
  int take(uint32_t* chunk) {
    for (;;) {
      void* busy_stream = nullptr;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        forgetLost();
        for (uint32_t at = 0; at < kNumStagingChunks; ++at) {
          if (chunks_[at].is_taken || !passed(at)) continue;
          chunks_[at].is_taken = true;
          *chunk = at;
          return 0;
        }
        next_ = (next_ + 1) % kNumStagingChunks;
        busy_stream = chunks_[next_].stream;
      }
      if (const int error = syncStream(busy_stream); error != 0) return error;
    }
  }

  // Its content goes to the device on `stream`; gives the count that says when.
  uint64_t send(uint32_t chunk, void* stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    chunks_[chunk].stream = stream;
    return ++chunks_[chunk].sent;
  }
  void give(uint32_t chunk) {
    std::lock_guard<std::mutex> lock(mutex_);
    chunks_[chunk].is_taken = false;
  }

 private:
  struct Chunk {
    bool is_taken = false;
    uint64_t sent = 0;
    void* stream = nullptr;
  };

  bool passed(uint32_t chunk) const {
    return connection().segment()->chunks_done[chunk].load() >=
           chunks_[chunk].sent;
  }
  // What a lost server had in progress will never be done.
  void forgetLost() {
    if (generation_ == connection().generation()) return;
    generation_ = connection().generation();
    for (uint32_t at = 0; at < kNumStagingChunks; ++at) {
      connection().segment()->chunks_done[at] = chunks_[at].sent;
    }
  }

  std::mutex mutex_;
  std::array<Chunk, kNumStagingChunks> chunks_;
  uint32_t next_ = 0;
  uint64_t generation_ = 0;
};

Staging& staging() {
  static auto* staging = new Staging;
  return *staging;
}

int copyFromPageable(uint64_t to, const std::byte* from, size_t size,
                     void* stream) {
  if (size <= kMaxInlineBytes) {
    return connection().post(CommandWriter(kCopyInline)
                                 .put(streamNumber(stream))
                                 .put(to)
                                 .putBytes(from, size),
                             {streamOf(stream)});
  }
  if (const int error = connection().start(); error != 0) return error;
  for (size_t done = 0; done < size;) {
    const uint64_t part = std::min(size - done, kStagingChunkBytes);
    uint32_t chunk;
    if (const int error = staging().take(&chunk); error != 0) return error;
    std::memcpy(connection().segment()->staging[chunk], from + done, part);
    const int error = connection().post(CommandWriter(kCopyFromChunk)
                                            .put(streamNumber(stream))
                                            .put(to + done)
                                            .put(chunk)
                                            .put(part)
                                            .put(staging().send(chunk, stream)),
                                        {streamOf(stream)});
    staging().give(chunk);
    if (error != 0) return error;
    done += part;
  }
  return 0;
}

int copyToPageable(std::byte* to, uint64_t from, size_t size, void* stream) {
  if (const int error = connection().start(); error != 0) return error;
  for (size_t done = 0; done < size;) {
    const uint64_t part = std::min(size - done, kStagingChunkBytes);
    uint32_t chunk;
    if (const int error = staging().take(&chunk); error != 0) return error;
    const int error = connection().call(CommandWriter(kCopyToChunk)
                                            .put(streamNumber(stream))
                                            .put(from + done)
                                            .put(chunk)
                                            .put(part),
                                        nullptr, {streamOf(stream)});
    if (error == 0) {
      std::memcpy(to + done, connection().segment()->staging[chunk], part);
    }
    staging().give(chunk);
    if (error != 0) return error;
    done += part;
  }
  return 0;
}

}  // namespace

int copy(void* to, const void* from, size_t size_bytes, void* stream) {
  if (size_bytes == 0)
    return connection().isUsable() ? 0 : connection().start();
  const Place target = placeOf(to), source = placeOf(from);
  const auto to_address = reinterpret_cast<uint64_t>(to);
  const auto from_address = reinterpret_cast<uint64_t>(from);
  if (target != Place::kPageable && source != Place::kPageable) {
    return connection().post(CommandWriter(kCopy)
                                 .put(streamNumber(stream))
                                 .put(to_address)
                                 .put(from_address)
                                 .put(uint64_t{size_bytes}),
                             {streamOf(stream)});
  }
  if (target != Place::kPageable) {
    return copyFromPageable(to_address, static_cast<const std::byte*>(from),
                            size_bytes, stream);
  }
  if (source != Place::kPageable) {
    return copyToPageable(static_cast<std::byte*>(to), from_address, size_bytes,
                          stream);
  }
  if (const int error = syncStream(stream); error != 0) return error;
  std::memmove(to, from, size_bytes);
  return 0;
}

int fill(void* at, uint32_t pattern, uint32_t width, uint64_t count,
         void* stream) {
  return connection().post(CommandWriter(kFill)
                               .put(streamNumber(stream))
                               .put(reinterpret_cast<uint64_t>(at))
                               .put(pattern)
                               .put(width)
                               .put(count),
                           {streamOf(stream)});
}

int allocate(void** address, size_t size_bytes) {
  *address = nullptr;
  if (size_bytes == 0) return 0;
  const auto block = connection().device_space.allocate(size_bytes);
  if (!block) return kCudaOutOfMemory;
  const int error = connection().call(CommandWriter(kMapMemory)
                                          .put(block->address)
                                          .put(block->size_bytes)
                                          .put(uint8_t{0}));
  // While the device is lost it is mapped later, with all the others.
  if (error != 0 && connection().state() != State::kLost) {
    connection().device_space.release(block->address);
    return error;
  }
  *address = reinterpret_cast<void*>(block->address);
  return 0;
}

int release(void* address) {
  if (address == nullptr) return 0;
  const auto at = reinterpret_cast<uint64_t>(address);
  if (!connection().device_space.find(at)) return kCudaInvalidValue;
  // CUDA waits for the device here; nobody may get the address before that.
  if (connection().isUsable()) connection().call(CommandWriter(kSyncDevice));
  const auto block = connection().device_space.release(at);
  if (!block) return kCudaInvalidValue;
  if (connection().isUsable()) {
    connection().post(
        CommandWriter(kUnmapMemory).put(block->address).put(block->size_bytes));
  }
  return 0;
}

int pointerAttributes(PointerAttributes* attributes, const void* address) {
  *attributes = {};
  const auto at = reinterpret_cast<uint64_t>(address);
  attributes->device = connection().chosen_device;
  if (connection().device_space.find(at)) {
    attributes->type = kDeviceMemory;
    attributes->device_pointer = const_cast<void*>(address);
  } else if (connection().host_space.find(at)) {
    attributes->type = kHostMemory;
    attributes->device_pointer = attributes->host_pointer =
        const_cast<void*>(address);
  } else {
    attributes->device = -2;  // as cudart says of what it does not know
  }
  return 0;
}

}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT int cudaMalloc(void** address, size_t size_bytes) {
  return report(allocate(address, size_bytes));
}

MNEMOSYNE_EXPORT int cudaFree(void* address) {
  return report(release(address));
}

MNEMOSYNE_EXPORT int cudaHostAlloc(void** address, size_t size_bytes,
                                   unsigned) {
  *address = nullptr;
  if (size_bytes == 0) return 0;
  auto& connection = Connection::instance();
  const int started = connection.start();
  if (started != 0 && !onlyBooks()) return report(started);
  const auto block = connection.host_space.allocate(size_bytes);
  if (!block) return report(kCudaOutOfMemory);
  const int error = connection.call(
      CommandWriter(kMapHost).put(block->address).put(block->size_bytes));
  if (error != 0 && connection.state() != State::kLost) {
    connection.host_space.release(block->address);
    return report(error);
  }
  *address = reinterpret_cast<void*>(block->address);
  return 0;
}

MNEMOSYNE_EXPORT int cudaMallocHost(void** address, size_t size_bytes) {
  return cudaHostAlloc(address, size_bytes, 0);
}

MNEMOSYNE_EXPORT int cudaFreeHost(void* address) {
  if (address == nullptr) return 0;
  auto& connection = Connection::instance();
  const auto at = reinterpret_cast<uint64_t>(address);
  if (!connection.host_space.find(at)) return report(kCudaInvalidValue);
  if (connection.isUsable()) connection.call(CommandWriter(kSyncDevice));
  if (connection.isUsable()) connection.post(CommandWriter(kUnmapHost).put(at));
  const auto block = connection.host_space.find(at);
  // The pages go back to the system, in both processes.
  if (connection.state() != State::kChild) {
    madvise(address, block->size_bytes, MADV_REMOVE);
  }
  connection.host_space.release(at);
  return 0;
}

MNEMOSYNE_EXPORT int cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  size_t values[2] = {};
  Answer answer{values, sizeof values};
  const int error =
      Connection::instance().call(CommandWriter(kMemoryInfo), &answer);
  *free_bytes = values[0];
  *total_bytes = values[1];
  return report(error);
}

MNEMOSYNE_EXPORT int cudaPointerGetAttributes(PointerAttributes* attributes,
                                              const void* address) {
  return report(pointerAttributes(attributes, address));
}

MNEMOSYNE_EXPORT int cudaMemcpyAsync(void* to, const void* from,
                                     size_t size_bytes, int, void* stream) {
  return report(copy(to, from, size_bytes, stream));
}

MNEMOSYNE_EXPORT int cudaMemcpy(void* to, const void* from, size_t size_bytes,
                                int) {
  const int error = copy(to, from, size_bytes, nullptr);
  return report(error != 0 ? error : syncStream(nullptr));
}

MNEMOSYNE_EXPORT int cudaMemsetAsync(void* at, int value, size_t count,
                                     void* stream) {
  return report(fill(at, value & 0xff, 1, count, stream));
}

MNEMOSYNE_EXPORT int cudaMemset(void* at, int value, size_t count) {
  return cudaMemsetAsync(at, value, count, nullptr);
}
