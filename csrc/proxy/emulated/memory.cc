#include "proxy/emulated/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proxy/cuda_abi.h"

namespace mnemosyne::proxy::emulated {
namespace {

constexpr int kMapFailed = 205;
constexpr int kAlreadyRegistered = 712;
constexpr int kNotRegistered = 713;

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }
bool isWhole(uint64_t value) {
  return value > 0 && value % kGranularityBytes == 0;
}

// Takes the addresses, without memory behind them; from where somebody has
// mapped memory too, so that nothing else gets there in between.
void* take(uint64_t address, size_t size_bytes, int flags) {
  return mmap(pointer(address), size_bytes, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
}

// The entry of the range that `address` lies in.
template <typename Ranges>
auto rangeOf(Ranges& ranges, uint64_t address) {
  auto next = ranges.upper_bound(address);
  return next == ranges.begin() ? ranges.end() : --next;
}

}  // namespace

int Memory::file() {
  if (file_ < 0) {
    file_ = memfd_create("mnemosyne-emulated-device", MFD_CLOEXEC);
    // Holes cost nothing, so places are never used again.
    if (file_ >= 0 && ftruncate(file_, off_t{1} << 60) != 0) {
      close(file_);
      file_ = -1;
    }
  }
  return file_;
}

int Memory::reserve(size_t size_bytes, uint64_t wish, uint64_t* address) {
  if (!isWhole(size_bytes)) return kCudaInvalidValue;
  std::lock_guard<std::mutex> lock(mutex_);
  void* taken = MAP_FAILED;
  if (wish != 0) taken = take(wish, size_bytes, MAP_FIXED_NOREPLACE);
  if (taken == MAP_FAILED) {
    // Anywhere, cut to the granularity.
    const size_t larger = size_bytes + kGranularityBytes;
    taken = take(0, larger, 0);
    if (taken == MAP_FAILED) return kCudaOutOfMemory;
    const auto begin = reinterpret_cast<uint64_t>(taken);
    const uint64_t aligned =
        (begin + kGranularityBytes - 1) / kGranularityBytes * kGranularityBytes;
    if (aligned > begin) munmap(taken, aligned - begin);
    const uint64_t end = aligned + size_bytes;
    if (begin + larger > end) munmap(pointer(end), begin + larger - end);
    taken = pointer(aligned);
  }
  *address = reinterpret_cast<uint64_t>(taken);
  reservations_[*address] = size_bytes;
  return kCudaSuccess;
}

int Memory::free(uint64_t address, size_t size_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second != size_bytes) {
    return kCudaInvalidValue;
  }
  const auto mapping = mappings_.lower_bound(address);
  if (mapping != mappings_.end() && mapping->first < address + size_bytes) {
    return kCudaInvalidValue;
  }
  munmap(pointer(address), size_bytes);
  reservations_.erase(found);
  return kCudaSuccess;
}

int Memory::create(size_t size_bytes, uint64_t* handle) {
  if (!isWhole(size_bytes)) return kCudaInvalidValue;
  std::lock_guard<std::mutex> lock(mutex_);
  if (size_bytes > size_bytes_ - used_bytes_) return kCudaOutOfMemory;
  if (file() < 0) return kCudaOutOfMemory;
  used_bytes_ += size_bytes;
  *handle = next_handle_;
  next_handle_ += size_bytes;
  creations_[*handle] = {size_bytes, 0, false};
  return kCudaSuccess;
}

int Memory::release(uint64_t handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = creations_.find(handle);
  if (found == creations_.end() || found->second.released) {
    return kCudaInvalidValue;
  }
  found->second.released = true;
  dropIfUnused(handle);
  return kCudaSuccess;
}

void Memory::dropIfUnused(uint64_t handle) {
  const auto found = creations_.find(handle);
  const Creation& creation = found->second;
  if (!creation.released || creation.num_mappings > 0) return;
  fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            static_cast<off_t>(handle),
            static_cast<off_t>(creation.size_bytes));
  used_bytes_ -= creation.size_bytes;
  creations_.erase(found);
}

bool Memory::isReserved(uint64_t address, size_t size_bytes) const {
  const auto found = rangeOf(reservations_, address);
  return found != reservations_.end() &&
         address + size_bytes <= found->first + found->second;
}

int Memory::map(uint64_t address, size_t size_bytes, size_t offset,
                uint64_t handle) {
  if (!isWhole(size_bytes) || !isWhole(address)) return kCudaInvalidValue;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = creations_.find(handle);
  if (found == creations_.end() || found->second.released || offset != 0 ||
      size_bytes != found->second.size_bytes) {
    return kCudaInvalidValue;
  }
  if (!isReserved(address, size_bytes)) return kCudaInvalidValue;
  const auto before = rangeOf(mappings_, address + size_bytes - 1);
  if (before != mappings_.end() &&
      before->first + before->second.size_bytes > address) {
    return kCudaInvalidValue;
  }
  if (mmap(pointer(address), size_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
           file_, static_cast<off_t>(handle)) == MAP_FAILED) {
    return kMapFailed;
  }
  ++found->second.num_mappings;
  mappings_[address] = {size_bytes, handle, false};
  return kCudaSuccess;
}

int Memory::unmap(uint64_t address, size_t size_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  // Several mappings may go at once, but only whole ones.
  uint64_t at = address;
  while (at < address + size_bytes) {
    const auto found = mappings_.find(at);
    if (found == mappings_.end()) return kCudaInvalidValue;
    at += found->second.size_bytes;
  }
  if (at != address + size_bytes || size_bytes == 0) return kCudaInvalidValue;
  if (take(address, size_bytes, MAP_FIXED) == MAP_FAILED) return kMapFailed;
  for (at = address; at < address + size_bytes;) {
    const auto found = mappings_.find(at);
    const Mapping mapping = found->second;
    mappings_.erase(found);
    --creations_.at(mapping.handle).num_mappings;
    dropIfUnused(mapping.handle);
    at += mapping.size_bytes;
  }
  return kCudaSuccess;
}

int Memory::setAccess(uint64_t address, size_t size_bytes, bool accessible) {
  std::lock_guard<std::mutex> lock(mutex_);
  uint64_t at = address;
  while (at < address + size_bytes) {
    const auto found = mappings_.find(at);
    if (found == mappings_.end()) return kCudaInvalidValue;
    at += found->second.size_bytes;
  }
  if (at != address + size_bytes || size_bytes == 0) return kCudaInvalidValue;
  const int protection = accessible ? PROT_READ | PROT_WRITE : PROT_NONE;
  if (mprotect(pointer(address), size_bytes, protection) != 0) {
    return kMapFailed;
  }
  for (at = address; at < address + size_bytes;) {
    Mapping& mapping = mappings_.at(at);
    mapping.accessible = accessible;
    at += mapping.size_bytes;
  }
  return kCudaSuccess;
}

int Memory::registerHost(const void* address, size_t size_bytes) {
  if (address == nullptr || size_bytes == 0) return kCudaInvalidValue;
  const auto begin = reinterpret_cast<uint64_t>(address);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto before = rangeOf(registrations_, begin + size_bytes - 1);
  if (before != registrations_.end() &&
      before->first + before->second > begin) {
    return kAlreadyRegistered;
  }
  registrations_[begin] = size_bytes;
  return kCudaSuccess;
}

int Memory::unregisterHost(const void* address) {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool found =
      registrations_.erase(reinterpret_cast<uint64_t>(address)) > 0;
  return found ? kCudaSuccess : kNotRegistered;
}

bool Memory::isDevice(uint64_t address, size_t size_bytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t end = address + size_bytes;
  do {
    const auto found = rangeOf(mappings_, address);
    if (found == mappings_.end() || !found->second.accessible) return false;
    const uint64_t mapped_end = found->first + found->second.size_bytes;
    if (address >= mapped_end) return false;
    address = mapped_end;
  } while (address < end);
  return true;
}

bool Memory::isRegistered(uint64_t address, size_t size_bytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = rangeOf(registrations_, address);
  return found != registrations_.end() &&
         address + size_bytes <= found->first + found->second;
}

size_t Memory::freeBytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return size_bytes_ - used_bytes_;
}

}  // namespace mnemosyne::proxy::emulated
