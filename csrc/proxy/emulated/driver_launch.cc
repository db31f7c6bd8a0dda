// The driver: libraries, kernels and launches.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "proxy/emulated/driver.h"
#include "proxy/emulated/library.h"
#include "proxy/emulated/registry.h"

namespace mnemosyne::proxy::emulated {
namespace {

// CUfunction_attribute
enum FunctionAttribute : int {
  kMaxThreads = 0,
  kNumRegisters = 4,
  kPtxVersion = 5,
  kBinaryVersion = 6,
  kMaxDynamicShared = 8,
  kCarveout = 9,
  kNonPortableCluster = 14,
  kLastFunctionAttribute = 15,
};

int getAttribute(int* value, int attribute, void* kernel) {
  if (const int error = contextError()) return error;
  if (attribute < 0 || attribute > kLastFunctionAttribute) {
    return kCudaInvalidValue;
  }
  return libraries().with(kernel, [&](const LoadedKernel& loaded) -> int {
    switch (attribute) {
      case kMaxThreads:
        *value = kMaxThreadsPerBlock;
        break;
      case kNumRegisters:
        *value = 32;
        break;
      case kPtxVersion:
      case kBinaryVersion:
        *value = 90;
        break;
      case kMaxDynamicShared:
        *value = loaded.max_dynamic_shared_bytes;
        break;
      case kCarveout:
        *value = loaded.shared_memory_carveout;
        break;
      default:
        *value = 0;
    }
    return kCudaSuccess;
  });
}

int setAttribute(int attribute, int value, void* kernel) {
  if (const int error = contextError()) return error;
  return libraries().with(kernel, [&](LoadedKernel& loaded) -> int {
    if (attribute == kMaxDynamicShared && value >= 0 &&
        value <= kSharedBytesPerBlockOptIn) {
      loaded.max_dynamic_shared_bytes = value;
    } else if (attribute == kCarveout && value >= -1 && value <= 100) {
      loaded.shared_memory_carveout = value;
    } else if (attribute != kNonPortableCluster) {
      return kCudaInvalidValue;
    }
    return kCudaSuccess;
  });
}

int parameterInfo(void* kernel, size_t index, size_t* offset, size_t* size) {
  if (const int error = contextError()) return error;
  return libraries().with(kernel, [&](const LoadedKernel& loaded) -> int {
    if (!loaded.parameters.has_value()) return kCudaNotSupported;
    if (index >= loaded.parameters->size()) return kCudaInvalidValue;
    const KernelParameter& parameter = (*loaded.parameters)[index];
    *offset = parameter.offset;
    if (size != nullptr) *size = parameter.size_bytes;
    return kCudaSuccess;
  });
}

// The parameters of one launch, laid out as the kernel wants them.
using Buffer = std::vector<std::byte>;

int copyExtra(void* const* extra, Buffer* buffer) {
  const void* begin = nullptr;
  const size_t* size = nullptr;
  for (; *extra != nullptr; extra += 2) {
    switch (reinterpret_cast<uintptr_t>(extra[0])) {
      case 1:  // CU_LAUNCH_PARAM_BUFFER_POINTER
        begin = extra[1];
        break;
      case 2:  // CU_LAUNCH_PARAM_BUFFER_SIZE
        size = static_cast<const size_t*>(extra[1]);
        break;
      default:
        return kCudaInvalidValue;
    }
  }
  if (size == nullptr || (begin == nullptr && *size > 0)) {
    return kCudaInvalidValue;
  }
  const auto* const bytes = static_cast<const std::byte*>(begin);
  buffer->assign(bytes, bytes + *size);
  return kCudaSuccess;
}

int copyParameters(void* const* values, const LoadedKernel& kernel,
                   Buffer* buffer) {
  if (!kernel.parameters.has_value()) return kCudaNotSupported;
  for (size_t i = 0; i < kernel.parameters->size(); ++i) {
    const auto [offset, size_bytes] = (*kernel.parameters)[i];
    if (values == nullptr || values[i] == nullptr) return kCudaInvalidValue;
    buffer->resize(std::max<size_t>(buffer->size(), offset + size_bytes));
    std::memcpy(buffer->data() + offset, values[i], size_bytes);
  }
  return kCudaSuccess;
}

bool isLaunchable(const LaunchConfig& config, const LoadedKernel& kernel) {
  const Dim3& grid = config.grid;
  const Dim3& block = config.block;
  const auto within = [](uint32_t value, int attribute) {
    return value >= 1 &&
           value <= static_cast<uint32_t>(deviceAttribute(attribute));
  };
  return within(block.x, 2) && within(block.y, 3) && within(block.z, 4) &&
         within(grid.x, 5) && within(grid.y, 6) && within(grid.z, 7) &&
         size_t{1} * block.x * block.y * block.z <= kMaxThreadsPerBlock &&
         config.shared_memory_bytes <=
             static_cast<uint32_t>(kernel.max_dynamic_shared_bytes);
}

Operation operationOf(const LaunchConfig& config, Kernel* kernel,
                      const std::string& name, Buffer buffer) {
  Operation operation;
  operation.is_counted = true;
  operation.body = [kernel, name, grid = config.grid, block = config.block,
                    shared_bytes = config.shared_memory_bytes,
                    buffer = std::move(buffer)]() -> int {
    if (kernel == nullptr) return kCudaSuccess;
    Launch launch;
    launch.grid = grid;
    launch.block = block;
    launch.shared_bytes = shared_bytes;
    launch.parameters = buffer.data();
    launch.parameters_bytes = buffer.size();
    kernel(launch);
    if (launch.error != kCudaSuccess) {
      std::fprintf(stderr,
                   "emulated device: kernel %s with %zu bytes of parameters "
                   "ends with error %d\n",
                   name.c_str(), launch.parameters_bytes, launch.error);
    }
    return launch.error;
  };
  return operation;
}

}  // namespace
}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int cuLibraryLoadData(void** library, const void* code,
                                       int* /*options*/, void** /*values*/,
                                       unsigned /*num_options*/,
                                       int* /*library_options*/,
                                       void** /*library_values*/,
                                       unsigned /*num_library_options*/) {
  if (device() == nullptr) return kCudaNotInitialized;
  if (const int error = device()->error()) return error;
  return libraries().load(code, library);
}

MNEMOSYNE_EXPORT int cuLibraryUnload(void* library) {
  if (const int error = contextError()) return error;
  return libraries().unload(library, device()->memory());
}

MNEMOSYNE_EXPORT int cuLibraryGetKernel(void** kernel, void* library,
                                        const char* name) {
  if (const int error = contextError()) return error;
  if (name == nullptr) return kCudaInvalidValue;
  return libraries().kernel(library, name,
                            device()->options().skip_unknown_kernels, kernel);
}

MNEMOSYNE_EXPORT int cuLibraryGetGlobal(CuDevicePtr* to, size_t* size_bytes,
                                        void* library, const char* name) {
  if (const int error = contextError()) return error;
  if (name == nullptr) return kCudaInvalidValue;
  uint64_t address = 0;
  size_t size = 0;
  const int error =
      libraries().variable(library, name, device()->memory(), &address, &size);
  if (error != kCudaSuccess) return error;
  if (to != nullptr) *to = address;
  if (size_bytes != nullptr) *size_bytes = size;
  return kCudaSuccess;
}

MNEMOSYNE_EXPORT int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  if (const int error = contextError()) return error;
  return libraries().with(kernel, [](const LoadedKernel&) { return 0; });
}

MNEMOSYNE_EXPORT int cuKernelGetAttribute(int* value, int attribute,
                                          void* kernel, int /*device*/) {
  return getAttribute(value, attribute, kernel);
}

MNEMOSYNE_EXPORT int cuFuncGetAttribute(int* value, int attribute,
                                        void* function) {
  return getAttribute(value, attribute, function);
}

MNEMOSYNE_EXPORT int cuKernelSetAttribute(int attribute, int value,
                                          void* kernel, int /*device*/) {
  return setAttribute(attribute, value, kernel);
}

MNEMOSYNE_EXPORT int cuFuncSetAttribute(void* function, int attribute,
                                        int value) {
  return setAttribute(attribute, value, function);
}

MNEMOSYNE_EXPORT int cuKernelGetParamInfo(void* kernel, size_t index,
                                          size_t* offset, size_t* size) {
  return parameterInfo(kernel, index, offset, size);
}

MNEMOSYNE_EXPORT int cuFuncGetParamInfo(void* function, size_t index,
                                        size_t* offset, size_t* size) {
  return parameterInfo(function, index, offset, size);
}

MNEMOSYNE_EXPORT int cuLaunchKernelEx(const LaunchConfig* config,
                                      void* function, void** parameters,
                                      void** extra) {
  if (const int error = contextError()) return error;
  if (config == nullptr) return kCudaInvalidValue;
  Operation operation;
  const int error =
      libraries().with(function, [&](const LoadedKernel& loaded) -> int {
        if (!isLaunchable(*config, loaded)) return kCudaInvalidValue;
        Kernel* const kernel = registry().find(loaded.name);
        if (kernel == nullptr) {
          if (!device()->options().skip_unknown_kernels) {
            std::fprintf(stderr, "emulated device: no host function for %s\n",
                         loaded.name.c_str());
            return kCudaNotFound;
          }
          registry().skipped(loaded.name);
        }
        Buffer buffer;
        if (extra != nullptr) {
          if (const int wrong = copyExtra(extra, &buffer)) return wrong;
        } else if (kernel != nullptr) {
          if (const int wrong = copyParameters(parameters, loaded, &buffer)) {
            return wrong;
          }
        }
        operation =
            operationOf(*config, kernel, loaded.name, std::move(buffer));
        return kCudaSuccess;
      });
  if (error != kCudaSuccess) return error;
  return device()->submit(config->stream, std::move(operation));
}

MNEMOSYNE_EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* num_blocks, void* function, int block_size, size_t shared_bytes,
    unsigned /*flags*/) {
  if (const int error = contextError()) return error;
  if (block_size <= 0) return kCudaInvalidValue;
  return libraries().with(function, [&](const LoadedKernel& loaded) -> int {
    *num_blocks = 0;
    if (block_size > kMaxThreadsPerBlock ||
        shared_bytes > static_cast<size_t>(loaded.max_dynamic_shared_bytes)) {
      return kCudaSuccess;
    }
    const auto by_shared =
        static_cast<int>(kSharedBytesPerMultiprocessor / (shared_bytes + 1024));
    *num_blocks = std::min({kMaxBlocksPerMultiprocessor, by_shared,
                            kMaxThreadsPerMultiprocessor / block_size});
    return kCudaSuccess;
  });
}
