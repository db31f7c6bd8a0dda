// The driver: initialization, devices, contexts, names of errors.
#include "proxy/emulated/driver.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "proxy/emulated/properties.h"

namespace mnemosyne::proxy::emulated {
namespace {

// The primary context, the only one there is; only its address counts.
char the_context;
thread_local void* current_context = nullptr;

struct ErrorName {
  int error;
  const char* name;
  const char* text;
};
constexpr ErrorName kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {205, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access"},
    {710, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

int nameOf(int error, const char* ErrorName::* field, const char** to) {
  for (const ErrorName& each : kErrors) {
    if (each.error != error) continue;
    *to = each.*field;
    return kCudaSuccess;
  }
  *to = nullptr;
  return kCudaInvalidValue;
}

int copyText(const char* from, char* to, int size) {
  if (to == nullptr || size <= 0) return kCudaInvalidValue;
  std::snprintf(to, static_cast<size_t>(size), "%s", from);
  return kCudaSuccess;
}

}  // namespace

int deviceError(int ordinal) {
  if (device() == nullptr) return kCudaNotInitialized;
  const bool is_there =
      ordinal >= 0 && ordinal < device()->options().numDevices();
  return is_there ? kCudaSuccess : kCudaInvalidDevice;
}

int contextError() {
  if (device() == nullptr) return kCudaNotInitialized;
  if (const int error = device()->error()) return error;
  return current_context == nullptr ? kCudaInvalidContext : kCudaSuccess;
}

int libraryError() {
  if (const int error = openDevice()) return error;
  if (current_context == nullptr) current_context = &the_context;
  return device()->error();
}

}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int cuInit(unsigned flags) {
  return flags == 0 ? openDevice() : kCudaInvalidValue;
}

MNEMOSYNE_EXPORT int cuDriverGetVersion(int* version) {
  if (version == nullptr) return kCudaInvalidValue;
  *version = 13000;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuDeviceGetCount(int* count) {
  if (device() == nullptr) return kCudaNotInitialized;
  *count = device()->options().numDevices();
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuDeviceGet(int* to, int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  *to = ordinal;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuDeviceGetName(char* name, int size, int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  return copyText(kDeviceName, name, size);
}

MNEMOSYNE_EXPORT int cuDeviceGetUuid_v2(void* uuid, int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  writeUuid(device()->options().serialOf(ordinal), uuid);
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuDeviceGetUuid(void* uuid, int ordinal) {
  return cuDeviceGetUuid_v2(uuid, ordinal);
}

MNEMOSYNE_EXPORT int cuDeviceGetPCIBusId(char* id, int size, int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  const int serial = device()->options().serialOf(ordinal);
  char text[32];
  std::snprintf(text, sizeof text, "%04x:01:00.0", serial & 0xffff);
  return copyText(text, id, size);
}

MNEMOSYNE_EXPORT int cuDeviceTotalMem_v2(size_t* size_bytes, int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  *size_bytes = device()->memory().totalBytes();
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuDeviceGetAttribute(int* value, int attribute,
                                          int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  if (attribute <= 0 || attribute > kLastDeviceAttribute) {
    return kCudaInvalidValue;
  }
  *value = deviceAttribute(attribute);
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cudaGetDeviceProperties(void* properties, int ordinal) {
  if (const int error = openDevice()) return error;
  if (const int error = deviceError(ordinal)) return error;
  fillProperties(device()->memory().totalBytes(),
                 device()->options().serialOf(ordinal), properties);
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuDevicePrimaryCtxRetain(void** context, int ordinal) {
  if (const int error = deviceError(ordinal)) return error;
  *context = &the_context;
  return device()->error();
}

MNEMOSYNE_EXPORT int cuDevicePrimaryCtxRelease_v2(int ordinal) {
  return deviceError(ordinal);
}

MNEMOSYNE_EXPORT int cuDevicePrimaryCtxRelease(int ordinal) {
  return deviceError(ordinal);
}

MNEMOSYNE_EXPORT int cuCtxSetCurrent(void* context) {
  if (device() == nullptr) return kCudaNotInitialized;
  if (context != nullptr && context != &the_context) {
    return kCudaInvalidContext;
  }
  current_context = context;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuCtxGetCurrent(void** context) {
  if (device() == nullptr) return kCudaNotInitialized;
  *context = current_context;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuCtxSynchronize() {
  if (const int error = contextError()) return error;
  return device()->wait(device()->allPoints());
}

MNEMOSYNE_EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  if (const int error = contextError()) return error;
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuGetErrorName(int error, const char** name) {
  return nameOf(error, &ErrorName::name, name);
}

MNEMOSYNE_EXPORT int cuGetErrorString(int error, const char** text) {
  return nameOf(error, &ErrorName::text, text);
}

// Names come without the suffix of their version; the newest one is meant.
MNEMOSYNE_EXPORT int cuGetProcAddress_v2(const char* symbol, void** function,
                                         int /*version*/, uint64_t /*flags*/,
                                         int* status) {
  if (symbol == nullptr || function == nullptr) return kCudaInvalidValue;
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&cuGetProcAddress_v2), &self);
  void* const library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = nullptr;
  if (library != nullptr) {
    *function = dlsym(library, (std::string(symbol) + "_v2").c_str());
    if (*function == nullptr) *function = dlsym(library, symbol);
    dlclose(library);
  }
  const bool found = *function != nullptr;
  if (status != nullptr) *status = found ? 0 : 1;  // 1: no such symbol
  return found ? kCudaSuccess : kCudaNotFound;
}
