// The device itself, and errors.
#include <cstdio>
#include <cstring>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

thread_local int last_error = 0;
thread_local uint64_t last_error_generation = 0;

struct Named {
  int code;
  const char* name;
  const char* text;
};
constexpr Named kErrors[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {3, "cudaErrorInitializationError", "initialization error"},
    {13, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {214, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {500, "cudaErrorSymbolNotFound", "named symbol not found"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {702, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {710, "cudaErrorAssert", "device-side assert triggered"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {999, "cudaErrorUnknown", "unknown error"},
};

const Named* named(int code) {
  for (const Named& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

}  // namespace

int report(int code) {
  if (code != 0) {
    last_error = code;
    last_error_generation = Connection::instance().generation();
  }
  return code;
}
int takeLastError() {
  const int error = peekLastError();
  last_error = 0;
  return error;
}
// What a thread has not asked for while the device was lost is no error of the
// next server.
int peekLastError() {
  return last_error_generation == Connection::instance().generation()
             ? last_error
             : 0;
}

bool onlyBooks() {
  const State state = Connection::instance().state();
  return state != State::kHealthy && state != State::kOff;
}

uint32_t nextId() {
  static std::atomic<uint32_t> next{16};
  return next++;
}

}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT int cudaGetDeviceCount(int* count) {
  *count = 0;
  if (const int error = Connection::instance().start();
      error != 0 && Connection::instance().state() != State::kLost) {
    return report(error);
  }
  *count = Connection::instance().numDevices();
  return 0;
}

MNEMOSYNE_EXPORT int cudaGetDevice(int* device) {
  *device = Connection::instance().chosen_device;
  return 0;
}

// One device per process: the first that is used stays.
MNEMOSYNE_EXPORT int cudaSetDevice(int device) {
  auto& connection = Connection::instance();
  if (device == connection.chosen_device) return 0;
  int count = 0;
  if (const int error = cudaGetDeviceCount(&count); error != 0) return error;
  if (device < 0 || device >= count) return report(kCudaInvalidDevice);
  if (!connection.choose(device)) {
    static std::atomic<bool> said{false};
    if (!said.exchange(true)) {
      std::fprintf(
          stderr,
          "mnemosyne: the device proxy serves one device per process: this one "
          "uses device %d and cannot use device %d as well\n",
          connection.chosen_device.load(), device);
    }
    return report(kCudaInvalidDevice);
  }
  return 0;
}

MNEMOSYNE_EXPORT int cudaDriverGetVersion(int* version) {
  auto& connection = Connection::instance();
  connection.start();
  *version = connection.driverVersion();
  return 0;
}

MNEMOSYNE_EXPORT int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return 0;
}

MNEMOSYNE_EXPORT int cudaDeviceGetAttribute(int* value, int attribute,
                                            int device) {
  // Asked for at each launch of some kernels, and never different.
  static auto* known = new std::map<std::pair<int, int>, int>;
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = known->find({attribute, device});
    if (found != known->end()) {
      *value = found->second;
      return 0;
    }
  }
  Answer answer{value, sizeof *value};
  const int error = Connection::instance().call(
      CommandWriter(kDeviceAttribute).put(attribute).put(device), &answer);
  if (error != 0) return report(error);
  std::lock_guard<std::mutex> lock(mutex);
  (*known)[{attribute, device}] = *value;
  return 0;
}

MNEMOSYNE_EXPORT int cudaGetDeviceProperties(void* properties, int device) {
  Answer answer{properties, kDevicePropertiesBytes};
  return report(Connection::instance().call(
      CommandWriter(kDeviceProperties).put(device), &answer));
}

MNEMOSYNE_EXPORT int cudaDeviceGetPCIBusId(char* text, int size, int device) {
  char got[32] = {};
  Answer answer{got, sizeof got};
  const int error = Connection::instance().call(
      CommandWriter(kDevicePciBusId).put(device), &answer);
  std::snprintf(text, size, "%s", got);
  return report(error);
}

MNEMOSYNE_EXPORT int cudaDeviceGetStreamPriorityRange(int* least,
                                                      int* greatest) {
  auto& connection = Connection::instance();
  const int error = connection.use();
  *least = connection.device().least_stream_priority;
  *greatest = connection.device().greatest_stream_priority;
  return onlyBooks() ? 0 : report(error);
}

MNEMOSYNE_EXPORT int cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return 0;
}

MNEMOSYNE_EXPORT int cudaDeviceSynchronize() {
  return report(Connection::instance().call(CommandWriter(kSyncDevice)));
}

MNEMOSYNE_EXPORT int cudaGetLastError() { return takeLastError(); }
MNEMOSYNE_EXPORT int cudaPeekAtLastError() { return peekLastError(); }

MNEMOSYNE_EXPORT const char* cudaGetErrorName(int code) {
  const auto* error = named(code);
  return error == nullptr ? "unrecognized error code" : error->name;
}

MNEMOSYNE_EXPORT const char* cudaGetErrorString(int code) {
  const auto* error = named(code);
  return error == nullptr ? "unrecognized error code" : error->text;
}

MNEMOSYNE_EXPORT int cudaProfilerStart() { return 0; }
MNEMOSYNE_EXPORT int cudaProfilerStop() { return 0; }
