// Shared memory without a name: it lives as long as somebody maps it.
#pragma once

#include <cstddef>
#include <optional>

#include "common/fd.h"

namespace mnemosyne {

class SharedMemory {
 public:
  // Makes a segment of zeros. Its size is sealed: whoever maps it can rely on
  // every byte being there, whatever the other side does. Throws
  // std::system_error.
  static SharedMemory create(size_t size_bytes);

  // Maps a segment made by create() elsewhere. Nothing if `fd` is not one of
  // that size, sealed.
  static std::optional<SharedMemory> map(Fd fd, size_t size_bytes);

  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&&) = delete;
  ~SharedMemory();

  std::byte* data() const { return data_; }
  int fd() const { return fd_.get(); }
  void closeFd() { fd_.reset(); }  // the mapping stays

 private:
  SharedMemory(Fd fd, std::byte* data, size_t size_bytes);

  Fd fd_;
  std::byte* data_;
  size_t size_bytes_;
  unsigned generation_;
};

}  // namespace mnemosyne
