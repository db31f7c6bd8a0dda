// The device's memory: addresses are reserved, memory is created, and the one
// is mapped to the other, as the driver's cuMem* functions have it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace mnemosyne::proxy::emulated {

constexpr size_t kGranularityBytes = size_t{2} << 20;

// All memory lies in one file that has no name, each creation at a place of its
// own, so that it keeps its content when it is mapped elsewhere. What is
// destroyed is cut out of the file.
//
// Any thread may call any method. They return a CudaError.
class Memory {
 public:
  explicit Memory(size_t size_bytes) : size_bytes_(size_bytes) {}

  int reserve(size_t size_bytes, uint64_t wish, uint64_t* address);
  int free(uint64_t address, size_t size_bytes);

  int create(size_t size_bytes, uint64_t* handle);
  // The memory goes when nothing maps it any more.
  int release(uint64_t handle);
  int map(uint64_t address, size_t size_bytes, size_t offset, uint64_t handle);
  int unmap(uint64_t address, size_t size_bytes);
  int setAccess(uint64_t address, size_t size_bytes, bool accessible);

  // Memory of the host that the device may use.
  int registerHost(const void* address, size_t size_bytes);
  int unregisterHost(const void* address);

  // Whether all of the range is mapped and accessible.
  bool isDevice(uint64_t address, size_t size_bytes) const;
  bool isRegistered(uint64_t address, size_t size_bytes) const;

  size_t totalBytes() const { return size_bytes_; }
  size_t freeBytes() const;

 private:
  struct Creation {
    size_t size_bytes;
    size_t num_mappings;
    bool released;
  };
  struct Mapping {
    size_t size_bytes;
    uint64_t handle;
    bool accessible;
  };

  int file();
  bool isReserved(uint64_t address, size_t size_bytes) const;
  void dropIfUnused(uint64_t handle);

  const size_t size_bytes_;
  mutable std::mutex mutex_;  // of all below
  int file_ = -1;
  size_t used_bytes_ = 0;
  uint64_t next_handle_ = kGranularityBytes;  // a handle is a place in the file
  std::map<uint64_t, size_t> reservations_;
  std::map<uint64_t, Creation> creations_;
  std::map<uint64_t, Mapping> mappings_;
  std::map<uint64_t, size_t> registrations_;
};

}  // namespace mnemosyne::proxy::emulated
