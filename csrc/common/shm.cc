#include "common/shm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "common/error.h"

namespace mnemosyne {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;

std::byte* mapShared(int fd, size_t size_bytes) {
  void* data =
      ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return nullptr;
  // A forked child has no business in it, and would keep the memory alive.
  (void)::madvise(data, size_bytes, MADV_DONTFORK);
  return static_cast<std::byte*>(data);
}

}  // namespace

SharedMemory::SharedMemory(Fd fd, std::byte* data, size_t size_bytes)
    : fd_(std::move(fd)),
      data_(data),
      size_bytes_(size_bytes),
      generation_(forkGeneration()) {}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_bytes_(other.size_bytes_),
      generation_(other.generation_) {}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr && generation_ == forkGeneration())
    ::munmap(data_, size_bytes_);
}

SharedMemory SharedMemory::create(size_t size_bytes) {
  Fd fd = Fd::make([] {
    return ::memfd_create("mnemosyne", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  });
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    throwErrno("cannot make a shared memory segment");
  }
  std::byte* data = mapShared(fd.get(), size_bytes);
  if (data == nullptr) throwErrno("cannot map a shared memory segment");
  return SharedMemory(std::move(fd), data, size_bytes);
}

std::optional<SharedMemory> SharedMemory::map(Fd fd, size_t size_bytes) {
  struct stat status{};
  const int seals = fd ? ::fcntl(fd.get(), F_GET_SEALS) : -1;
  if (seals < 0 || (seals & kSeals) != kSeals ||
      ::fstat(fd.get(), &status) != 0 ||
      status.st_size != static_cast<off_t>(size_bytes)) {
    return std::nullopt;
  }
  std::byte* data = mapShared(fd.get(), size_bytes);
  if (data == nullptr) return std::nullopt;
  return SharedMemory(std::move(fd), data, size_bytes);
}

}  // namespace mnemosyne
