// What the files of the client share: the records behind CUDA's handles, and
// the error of the calling thread. Each exported function has NVIDIA's
// signature, with int for enumerations and void* for handles.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "proxy/connection.h"
#include "proxy/cuda_abi.h"
#include "proxy/forward.h"

#define MNEMOSYNE_EXPORT extern "C" __attribute__((visibility("default")))

namespace mnemosyne::proxy {

// Keeps `code` for cudaGetLastError of this thread, unless it is 0, and returns
// it.
int report(int code);
int takeLastError();
int peekLastError();

// Whether calls that only keep books should just succeed: while the device is
// lost torch's destructors and NCCL's watchdog run on, and an error would end
// the process.
bool onlyBooks();

class Stream final : public Handle {
 public:
  Stream(unsigned flags, int priority);
  const unsigned flags;
  const int priority;

 private:
  void define(Connection& connection) override;
};

// The record behind a stream, or null for CUDA's three own ones (0 to 2).
inline Stream* streamOf(void* stream) {
  return reinterpret_cast<uintptr_t>(stream) <= 2
             ? nullptr
             : static_cast<Stream*>(stream);
}
inline uint32_t streamNumber(void* stream) {
  const Stream* record = streamOf(stream);
  return record == nullptr
             ? static_cast<uint32_t>(reinterpret_cast<uintptr_t>(stream))
             : record->id();
}
int syncStream(void* stream);

// Copies between any two places, as cudaMemcpyAsync.
int copy(void* to, const void* from, size_t size_bytes, void* stream);
int fill(void* at, uint32_t pattern, uint32_t width, uint64_t count,
         void* stream);
int allocate(void** address, size_t size_bytes);
int release(void* address);
int pointerAttributes(PointerAttributes* attributes, const void* address);

uint32_t nextId();  // never the same twice, from 16

}  // namespace mnemosyne::proxy
