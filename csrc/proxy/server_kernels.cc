#include <string>

#include "proxy/server.h"

namespace mnemosyne::proxy {

void* Server::kernel(uint32_t id) {
  const auto found = kernels_.find(id);
  return found == kernels_.end() ? nullptr : found->second;
}

int Server::functionAttributes(void* kernel, FunctionAttributes* attributes) {
  *attributes = {};
  int values[10] = {};  // CUfunction_attribute 0 to 9
  for (int attribute = 0; attribute < 10; ++attribute) {
    const int error = driver_->cuKernelGetAttribute(&values[attribute],
                                                    attribute, kernel, device_);
    if (error != 0) return error;
  }
  attributes->max_threads_per_block = values[0];
  attributes->shared_size_bytes = values[1];
  attributes->const_size_bytes = values[2];
  attributes->local_size_bytes = values[3];
  attributes->num_registers = values[4];
  attributes->ptx_version = values[5];
  attributes->binary_version = values[6];
  attributes->cache_mode_ca = values[7];
  attributes->max_dynamic_shared_size_bytes = values[8];
  attributes->preferred_shared_memory_carveout = values[9];
  return 0;
}

void Server::launch(CommandReader& reader) {
  void* what = kernel(reader.get<uint32_t>());
  LaunchConfig config{};
  config.stream = stream(reader.get<uint32_t>());
  config.grid = reader.get<Dim3>();
  config.block = reader.get<Dim3>();
  config.shared_memory_bytes = reader.get<uint32_t>();
  const auto raw_attributes = reader.getBytes();
  std::vector<LaunchAttribute> attributes(raw_attributes.size() /
                                          sizeof(LaunchAttribute));
  std::memcpy(attributes.data(), raw_attributes.data(),
              attributes.size() * sizeof(LaunchAttribute));
  config.attributes = attributes.data();
  config.num_attributes = attributes.size();
  const auto parameters = reader.getBytes();
  if (what == nullptr)
    return;  // that it is not there was said when it was loaded
  size_t size = parameters.size();
  // CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE, _END
  void* extra[] = {reinterpret_cast<void*>(1),
                   const_cast<std::byte*>(parameters.data()),
                   reinterpret_cast<void*>(2), &size, nullptr};
  check(driver_->cuLaunchKernelEx(&config, what, nullptr, extra),
        "cuLaunchKernelEx");
}

void Server::executeKernels(uint16_t opcode, CommandReader& reader,
                            Responder responder) {
  const auto& driver = *driver_;
  switch (opcode) {
    case kLoadLibrary: {
      const auto id = reader.get<uint32_t>();
      const auto* bytes = reinterpret_cast<const void*>(reader.get<uint64_t>());
      void* library = nullptr;
      const int error = driver.cuLibraryLoadData(
          &library, bytes, nullptr, nullptr, 0, nullptr, nullptr, 0);
      loaded_[id] = library;
      responder.answer(endIfLost(error, "cuLibraryLoadData"));
      break;
    }
    case kLoadKernel: {
      const auto id = reader.get<uint32_t>();
      void* library = loaded_[reader.get<uint32_t>()];
      const auto bytes = reader.getBytes();
      const std::string name(reinterpret_cast<const char*>(bytes.data()),
                             bytes.size());
      void* found = nullptr;
      const int error =
          driver.cuLibraryGetKernel(&found, library, name.c_str());
      check(error, ("cuLibraryGetKernel of " + name).c_str());
      kernels_[id] = error == 0 ? found : nullptr;
      break;
    }
    case kSetKernelAttribute: {
      void* what = kernel(reader.get<uint32_t>());
      const auto attribute = reader.get<int32_t>();
      const auto value = reader.get<int32_t>();
      if (what == nullptr) break;
      check(driver.cuKernelSetAttribute(attribute, value, what, device_),
            "cuKernelSetAttribute");
      break;
    }
    case kKernelAttributes: {
      FunctionAttributes attributes{};
      void* what = kernel(reader.get<uint32_t>());
      const int error = what == nullptr ? int{kCudaNotFound}
                                        : functionAttributes(what, &attributes);
      responder.answerWith(endIfLost(error, "cuKernelGetAttribute"),
                           attributes);
      break;
    }
    case kOccupancy: {
      void* what = kernel(reader.get<uint32_t>());
      const auto block = reader.get<int32_t>();
      const auto shared = reader.get<uint64_t>();
      const auto flags = reader.get<uint32_t>();
      void* function = nullptr;
      int blocks = 0;
      int error = what == nullptr ? int{kCudaNotFound}
                                  : driver.cuKernelGetFunction(&function, what);
      if (error == 0) {
        error = driver.cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
            &blocks, function, block, shared, flags);
      }
      responder.answerWith(endIfLost(error, "cuOccupancy"), blocks);
      break;
    }
    case kKernelParameters: {
      void* what = kernel(reader.get<uint32_t>());
      std::vector<KernelParameter> parameters;
      size_t offset = 0, size = 0;
      while (what != nullptr && parameters.size() < sizeof(Reply::data) / 8 &&
             driver.cuKernelGetParamInfo(what, parameters.size(), &offset,
                                         &size) == 0) {
        parameters.push_back(
            {static_cast<uint32_t>(offset), static_cast<uint32_t>(size)});
      }
      responder.answer(what == nullptr ? int{kCudaNotFound} : 0,
                       parameters.data(),
                       parameters.size() * sizeof(KernelParameter));
      break;
    }
    case kGlobalAddress: {
      void* library = loaded_[reader.get<uint32_t>()];
      const auto bytes = reader.getBytes();
      const std::string name(reinterpret_cast<const char*>(bytes.data()),
                             bytes.size());
      uint64_t found[2] = {};
      auto* get =
          libraries_.function<int(uint64_t*, size_t*, void*, const char*)>(
              Library::kCuda, "cuLibraryGetGlobal");
      const int error = get(&found[0], &found[1], library, name.c_str());
      responder.answerWith(endIfLost(error, "cuLibraryGetGlobal"), found);
      break;
    }
    case kLaunch:
      launch(reader);
      break;
    default:
      throw ProtocolError("no such command: " + std::to_string(opcode));
  }
}

}  // namespace mnemosyne::proxy
