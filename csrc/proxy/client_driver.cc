// The few functions of libcuda.so.1 that torch calls in the training process.
// There is no driver in it, and no context: these answer from what the client
// knows.
#include <dlfcn.h>

#include <cstring>

#include "proxy/client.h"

using namespace mnemosyne::proxy;

namespace {

// What a program takes for the context; it never looks inside.
int the_context;

Connection& connection() { return Connection::instance(); }

}  // namespace

MNEMOSYNE_EXPORT int cudaGetDeviceCount(int* count);
MNEMOSYNE_EXPORT int cudaSetDevice(int device);
MNEMOSYNE_EXPORT int cudaDeviceGetAttribute(int* value, int attribute,
                                            int device);
MNEMOSYNE_EXPORT const char* cudaGetErrorName(int code);
MNEMOSYNE_EXPORT const char* cudaGetErrorString(int code);

MNEMOSYNE_EXPORT int cuInit(unsigned) { return connection().start(); }

MNEMOSYNE_EXPORT int cuDriverGetVersion(int* version) {
  const int error = connection().start();
  *version = connection().driverVersion();
  return error;
}

MNEMOSYNE_EXPORT int cuDeviceGetCount(int* count) {
  return cudaGetDeviceCount(count);
}

MNEMOSYNE_EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

MNEMOSYNE_EXPORT int cuDeviceGetAttribute(int* value, int attribute,
                                          int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}

// torch asks some 2,000 times per step whether the context is there.
MNEMOSYNE_EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags,
                                                int* active) {
  *flags = 0;
  *active = connection().state() != State::kOff;
  return 0;
}

MNEMOSYNE_EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &the_context;
  return cudaSetDevice(device);
}

MNEMOSYNE_EXPORT int cuDevicePrimaryCtxRelease(int) { return 0; }
MNEMOSYNE_EXPORT int cuCtxSetCurrent(void*) { return 0; }

MNEMOSYNE_EXPORT int cuCtxGetCurrent(void** context) {
  *context = &the_context;
  return 0;
}

MNEMOSYNE_EXPORT int cuCtxPushCurrent(void*) { return 0; }

MNEMOSYNE_EXPORT int cuCtxPopCurrent(void** context) {
  return cuCtxGetCurrent(context);
}

MNEMOSYNE_EXPORT int cuDeviceGetUuid(void* uuid, int device) {
  Answer answer{uuid, 16};
  return connection().call(CommandWriter(kDeviceUuid).put(device), &answer);
}

MNEMOSYNE_EXPORT int cuGetErrorName(int code, const char** name) {
  *name = cudaGetErrorName(code);
  return 0;
}

MNEMOSYNE_EXPORT int cuGetErrorString(int code, const char** text) {
  *text = cudaGetErrorString(code);
  return 0;
}

MNEMOSYNE_EXPORT int cuPointerGetAttribute(void* value, int attribute,
                                           uint64_t address) {
  constexpr int kMemoryTypeAttribute = 2, kDevicePointer = 3, kHostPointer = 4,
                kDeviceOrdinal = 9;
  PointerAttributes attributes;
  pointerAttributes(&attributes, reinterpret_cast<void*>(address));
  if (attributes.type == kUnregisteredMemory) return kCudaInvalidValue;
  switch (attribute) {
    case kMemoryTypeAttribute:  // 1: host, 2: device
      *static_cast<unsigned*>(value) = attributes.type;
      return 0;
    case kDevicePointer:
      std::memcpy(value, &attributes.device_pointer, sizeof(void*));
      return 0;
    case kHostPointer:
      std::memcpy(value, &attributes.host_pointer, sizeof(void*));
      return attributes.host_pointer == nullptr ? int{kCudaInvalidValue} : 0;
    case kDeviceOrdinal:
      *static_cast<int*>(value) = attributes.device;
      return 0;
    default:
      return kCudaNotSupported;
  }
}

MNEMOSYNE_EXPORT int cuMemsetD32Async(uint64_t address, unsigned value,
                                      size_t count, void* stream) {
  return fill(reinterpret_cast<void*>(address), value, 4, count, stream);
}

// A function of the driver, by its name: ours, or none.
MNEMOSYNE_EXPORT int cudaGetDriverEntryPointByVersion(const char* name,
                                                      void** function, unsigned,
                                                      uint64_t, int* status) {
  constexpr int kFound = 0, kNotFound = 1;
  static void* const own = [] {
    Dl_info info{};
    dladdr(&the_context, &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  *function = std::strncmp(name, "cu", 2) == 0 ? dlsym(own, name) : nullptr;
  if (*function == nullptr) noteUnsupported("libcuda", name);
  if (status != nullptr) *status = *function == nullptr ? kNotFound : kFound;
  return 0;
}
