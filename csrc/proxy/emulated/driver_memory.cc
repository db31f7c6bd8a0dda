// The driver: memory, copies and fills.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "proxy/emulated/driver.h"

namespace mnemosyne::proxy::emulated {
namespace {

// A rectangle of bytes; plain copies are one row.
struct Area {
  uint64_t address;
  size_t pitch_bytes;
};

struct Extent {
  size_t width_bytes;
  size_t num_rows;
};

size_t span(const Area& area, const Extent& extent) {
  return (extent.num_rows - 1) * area.pitch_bytes + extent.width_bytes;
}

// The host reads the memory of whom, and when: a copy from or to memory that
// the device cannot reach by itself ends, as far as that memory is concerned,
// before the call returns.
enum class Side { kDevice, kPinned, kPageable };

Side sideOf(const Area& area, const Extent& extent) {
  const size_t size_bytes = span(area, extent);
  Memory& memory = device()->memory();
  if (memory.isDevice(area.address, size_bytes)) return Side::kDevice;
  if (memory.isRegistered(area.address, size_bytes)) return Side::kPinned;
  return Side::kPageable;
}

int copyRows(const Area& to, const Area& from, const Extent& extent) {
  for (size_t row = 0; row < extent.num_rows; ++row) {
    std::memmove(
        reinterpret_cast<void*>(to.address + row * to.pitch_bytes),
        reinterpret_cast<const void*>(from.address + row * from.pitch_bytes),
        extent.width_bytes);
  }
  return kCudaSuccess;
}

int copy(Area to, Area from, Extent extent, void* stream) {
  if (const int error = contextError()) return error;
  if (extent.width_bytes == 0 || extent.num_rows == 0) return kCudaSuccess;
  std::shared_ptr<std::vector<std::byte>> staged;
  if (sideOf(from, extent) == Side::kPageable) {
    staged = std::make_shared<std::vector<std::byte>>(extent.width_bytes *
                                                      extent.num_rows);
    const Area staging = {reinterpret_cast<uint64_t>(staged->data()),
                          extent.width_bytes};
    copyRows(staging, from, extent);
    from = staging;
  }
  Point end;
  Operation operation;
  operation.is_counted = true;
  operation.body = [to, from, extent, staged] {  // which lives as long as this
    return copyRows(to, from, extent);
  };
  if (const int error = device()->submit(stream, std::move(operation), &end)) {
    return error;
  }
  if (sideOf(to, extent) != Side::kPageable) return kCudaSuccess;
  return device()->wait({end});
}

// A side that the caller calls device memory must be that, or pinned.
bool isReachable(uint64_t address, size_t size_bytes) {
  return sideOf({address, size_bytes}, {size_bytes, 1}) != Side::kPageable;
}

int copyBytes(uint64_t to, uint64_t from, size_t size_bytes, void* stream) {
  return copy({to, size_bytes}, {from, size_bytes}, {size_bytes, 1}, stream);
}

template <typename T>
int fill(uint64_t address, T value, size_t count, void* stream) {
  if (const int error = contextError()) return error;
  if (count == 0) return kCudaSuccess;
  if (address % sizeof(T) != 0 || !isReachable(address, count * sizeof(T))) {
    return kCudaInvalidValue;
  }
  Operation operation;
  operation.is_counted = true;
  operation.body = [=]() -> int {
    std::fill_n(reinterpret_cast<T*>(address), count, value);
    return kCudaSuccess;
  };
  return device()->submit(stream, std::move(operation));
}

// CUDA_MEMCPY2D
struct PlaneCopy {
  struct Side {
    size_t x_bytes;
    size_t y;
    int memory_type;
    void* host;
    CuDevicePtr device;
    void* array;
    size_t pitch;

    bool isValid() const { return memory_type != 0 && memory_type != 3; }
    Area area() const {
      constexpr int kHost = 1;
      const uint64_t base =
          memory_type == kHost ? reinterpret_cast<uint64_t>(host) : device;
      return {base + y * pitch + x_bytes, pitch};
    }
  };
  Side from;
  Side to;
  size_t width_bytes;
  size_t height;
};
static_assert(sizeof(PlaneCopy) == 128);

}  // namespace
}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  if (const int error = contextError()) return error;
  *free_bytes = device()->memory().freeBytes();
  *total_bytes = device()->memory().totalBytes();
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuMemGetAllocationGranularity(size_t* size_bytes,
                                                   const AllocationProperties*,
                                                   int /*option*/) {
  if (device() == nullptr) return kCudaNotInitialized;
  *size_bytes = kGranularityBytes;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuMemAddressReserve(CuDevicePtr* address,
                                         size_t size_bytes,
                                         size_t /*alignment*/, CuDevicePtr wish,
                                         unsigned long long /*flags*/) {
  if (const int error = contextError()) return error;
  if (device()->options().other_address) wish = 0;
  uint64_t reserved = 0;
  const int error = device()->memory().reserve(size_bytes, wish, &reserved);
  *address = reserved;
  return error;
}

MNEMOSYNE_EXPORT int cuMemAddressFree(CuDevicePtr address, size_t size_bytes) {
  if (const int error = contextError()) return error;
  return device()->memory().free(address, size_bytes);
}

MNEMOSYNE_EXPORT int cuMemCreate(unsigned long long* handle, size_t size_bytes,
                                 const AllocationProperties* properties,
                                 unsigned long long /*flags*/) {
  if (const int error = contextError()) return error;
  constexpr int kPinned = 1, kOnDevice = 1;
  if (properties == nullptr || properties->type != kPinned ||
      properties->location.type != kOnDevice ||
      deviceError(properties->location.id) != kCudaSuccess) {
    return kCudaInvalidValue;
  }
  if (device()->isFull()) return kCudaOutOfMemory;
  uint64_t created = 0;
  const int error = device()->memory().create(size_bytes, &created);
  *handle = created;
  return error;
}

MNEMOSYNE_EXPORT int cuMemRelease(unsigned long long handle) {
  if (const int error = contextError()) return error;
  return device()->memory().release(handle);
}

MNEMOSYNE_EXPORT int cuMemMap(CuDevicePtr address, size_t size_bytes,
                              size_t offset, unsigned long long handle,
                              unsigned long long /*flags*/) {
  if (const int error = contextError()) return error;
  return device()->memory().map(address, size_bytes, offset, handle);
}

MNEMOSYNE_EXPORT int cuMemUnmap(CuDevicePtr address, size_t size_bytes) {
  if (const int error = contextError()) return error;
  // Does not wait for what still runs, because the driver's does not in all
  // cases either: who frees memory has to.
  return device()->memory().unmap(address, size_bytes);
}

MNEMOSYNE_EXPORT int cuMemSetAccess(CuDevicePtr address, size_t size_bytes,
                                    const AccessDescriptor* access,
                                    size_t count) {
  if (const int error = contextError()) return error;
  if (access == nullptr || count != 1) return kCudaInvalidValue;
  return device()->memory().setAccess(address, size_bytes, access->flags == 3);
}

MNEMOSYNE_EXPORT int cuMemHostRegister_v2(void* address, size_t size_bytes,
                                          unsigned /*flags*/) {
  if (const int error = contextError()) return error;
  return device()->memory().registerHost(address, size_bytes);
}

MNEMOSYNE_EXPORT int cuMemHostUnregister(void* address) {
  if (const int error = contextError()) return error;
  return device()->memory().unregisterHost(address);
}

MNEMOSYNE_EXPORT int cuMemHostGetDevicePointer_v2(CuDevicePtr* to,
                                                  void* address,
                                                  unsigned /*flags*/) {
  if (const int error = contextError()) return error;
  const auto number = reinterpret_cast<uint64_t>(address);
  if (!device()->memory().isRegistered(number, 1)) return kCudaInvalidValue;
  *to = number;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuMemcpyHtoDAsync_v2(CuDevicePtr to, const void* from,
                                          size_t size_bytes, void* stream) {
  if (const int error = contextError()) return error;
  if (!isReachable(to, size_bytes)) return kCudaInvalidValue;
  return copyBytes(to, reinterpret_cast<uint64_t>(from), size_bytes, stream);
}

MNEMOSYNE_EXPORT int cuMemcpyDtoHAsync_v2(void* to, CuDevicePtr from,
                                          size_t size_bytes, void* stream) {
  if (const int error = contextError()) return error;
  if (!isReachable(from, size_bytes)) return kCudaInvalidValue;
  return copyBytes(reinterpret_cast<uint64_t>(to), from, size_bytes, stream);
}

MNEMOSYNE_EXPORT int cuMemcpyDtoDAsync_v2(CuDevicePtr to, CuDevicePtr from,
                                          size_t size_bytes, void* stream) {
  if (const int error = contextError()) return error;
  if (!isReachable(to, size_bytes) || !isReachable(from, size_bytes)) {
    return kCudaInvalidValue;
  }
  return copyBytes(to, from, size_bytes, stream);
}

MNEMOSYNE_EXPORT int cuMemcpyAsync(CuDevicePtr to, CuDevicePtr from,
                                   size_t size_bytes, void* stream) {
  return copyBytes(to, from, size_bytes, stream);
}

MNEMOSYNE_EXPORT int cuMemcpy2DAsync_v2(const PlaneCopy* plane, void* stream) {
  if (plane == nullptr || !plane->from.isValid() || !plane->to.isValid() ||
      plane->from.pitch < plane->width_bytes ||
      plane->to.pitch < plane->width_bytes) {
    return kCudaInvalidValue;
  }
  return copy(plane->to.area(), plane->from.area(),
              {plane->width_bytes, plane->height}, stream);
}

MNEMOSYNE_EXPORT int cuMemsetD8Async(CuDevicePtr address, unsigned char value,
                                     size_t count, void* stream) {
  return fill(address, value, count, stream);
}

MNEMOSYNE_EXPORT int cuMemsetD16Async(CuDevicePtr address, unsigned short value,
                                      size_t count, void* stream) {
  return fill(address, value, count, stream);
}

MNEMOSYNE_EXPORT int cuMemsetD32Async(CuDevicePtr address, unsigned value,
                                      size_t count, void* stream) {
  return fill(address, value, count, stream);
}
