// Kernels: what nvcc's generated code registers, and how it launches.
//
// In CUDA 13 a launch `kernel<<<...>>>(...)` is a push of the configuration,
// then in a stub a pop, __cudaGetKernel (once for ever, so our record must
// outlive servers) and
// __cudaLaunchKernel. The parameters are packed here, in the device's layout,
// which the fat binary tells; the server gets them as bytes.
#include <cstdio>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "proxy/client.h"
#include "proxy/fat_binary.h"

namespace mnemosyne::proxy {
namespace {

Connection& connection() { return Connection::instance(); }

// The device code that one __cudaRegisterFatBinary announced.
class Image final : public Handle {
 public:
  explicit Image(const void* wrapper) : Handle(nextId()), wrapper_(wrapper) {}

  // Parsed at the first launch: most of the hundreds that torch has are never
  // used.
  const KernelTable& kernels(int compute_capability) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (table_ == nullptr) {
      table_ = std::make_unique<KernelTable>(
          FatBinary::at(wrapper_).kernels(compute_capability));
    }
    return *table_;
  }

 private:
  void define(Connection& connection) override {
    // By way of the segment; it may be taken away when the answer is there.
    const auto bytes = FatBinary::at(wrapper_).bytes();
    const auto block = connection.host_space.allocate(bytes.size());
    if (!block) return;
    std::memcpy(reinterpret_cast<void*>(block->address), bytes.data(),
                bytes.size());
    const int error = connection.callLocked(
        CommandWriter(kLoadLibrary).put(id()).put(block->address));
    connection.host_space.release(block->address);
    if (error != 0) {
      std::fprintf(stderr, "mnemosyne: the device refuses code with error %d\n",
                   error);
    }
  }

  const void* const wrapper_;
  std::mutex mutex_;
  std::unique_ptr<KernelTable> table_;
};

class Kernel final : public Handle {
 public:
  Kernel(Image* image, const char* name)
      : Handle(nextId()), image_(image), name_(name) {}

  // Where each parameter goes. From the fat binary, or else from the server.
  const KernelLayout* layout(int* error) {
    if (const auto* known = layout_.load(std::memory_order_acquire))
      return known;
    auto made = std::make_unique<KernelLayout>();
    *error = findLayout(made.get());
    if (*error != 0) return nullptr;
    const KernelLayout* none = nullptr;
    if (layout_.compare_exchange_strong(none, made.get()))
      return made.release();
    return none;
  }

  int setAttribute(int attribute, int value) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto [found, is_new] = attributes_.try_emplace(attribute, value);
      if (!is_new && found->second == value) return 0;
      found->second = value;
    }
    return connection().post(
        CommandWriter(kSetKernelAttribute).put(id()).put(attribute).put(value),
        {this});
  }

  Image* image() const { return image_; }

 private:
  int findLayout(KernelLayout* layout) {
    try {
      // The capability is known once the device is in use.
      if (const int error = connection().use(); error != 0) return error;
      const int capability = connection().device().compute_capability;
      const auto& table = image_->kernels(capability).kernels;
      const auto found = table.find(name_);
      if (found != table.end()) {
        *layout = found->second;
        return 0;
      }
    } catch (const FatBinaryError& unreadable) {
      std::fprintf(stderr, "mnemosyne: %s; the device is asked instead\n",
                   unreadable.what());
    }
    layout->parameters.resize(sizeof(Reply::data) / (sizeof(KernelParameter)));
    Answer answer{layout->parameters.data(),
                  layout->parameters.size() * sizeof(KernelParameter)};
    const int error = connection().call(
        CommandWriter(kKernelParameters).put(id()), &answer, {this});
    layout->parameters.resize(answer.got_bytes / sizeof(KernelParameter));
    for (const auto& parameter : layout->parameters) {
      layout->size_bytes =
          std::max(layout->size_bytes, parameter.offset + parameter.size_bytes);
    }
    return error;
  }

  void define(Connection& connection) override {
    connection.need(image_);
    connection.put(CommandWriter(kLoadKernel)
                       .put(id())
                       .put(image_->id())
                       .putBytes(name_, std::strlen(name_)));
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [attribute, value] : attributes_) {
      connection.put(CommandWriter(kSetKernelAttribute)
                         .put(id())
                         .put(attribute)
                         .put(value));
    }
  }

  Image* const image_;
  const char* const name_;
  std::atomic<const KernelLayout*> layout_{nullptr};
  std::mutex mutex_;
  std::map<int, int> attributes_;
};

struct Variable {
  Image* image;
  const char* name;
  size_t size_bytes;
};

// What was registered, by the address of its stub in the host's code.
class Registry {
 public:
  Image* addImage(const void* wrapper) {
    std::lock_guard<std::mutex> lock(mutex_);
    return &images_.emplace_back(wrapper);
  }
  void addKernel(const void* stub, Image* image, const char* name) {
    std::lock_guard<std::mutex> lock(mutex_);
    Kernel& kernel = kernels_.emplace_back(image, name);
    by_stub_[stub] = &kernel;
    by_stub_[&kernel] = &kernel;  // what __cudaGetKernel gave
  }
  void addVariable(const void* host, Variable variable) {
    std::lock_guard<std::mutex> lock(mutex_);
    variables_[host] = variable;
  }
  Kernel* kernel(const void* stub) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_stub_.find(stub);
    return found == by_stub_.end() ? nullptr : found->second;
  }
  const Variable* variable(const void* host) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = variables_.find(host);
    return found == variables_.end() ? nullptr : &found->second;
  }

 private:
  std::mutex mutex_;
  std::deque<Image> images_;
  std::deque<Kernel> kernels_;
  std::unordered_map<const void*, Kernel*> by_stub_;
  std::unordered_map<const void*, Variable> variables_;
};

Registry& registry() {
  static auto* registry = new Registry;
  return *registry;
}

// Attributes of a launch that name an event of ours in their value.
bool namesEvent(int attribute) { return attribute == 7 || attribute == 12; }

int launch(Kernel* kernel, Dim3 grid, Dim3 block, void** arguments,
           size_t shared_bytes, void* stream,
           std::span<const LaunchAttribute> attributes) {
  if (kernel == nullptr) return 98;  // cudaErrorInvalidDeviceFunction
  for (const auto& attribute : attributes) {
    if (namesEvent(attribute.id)) return kCudaNotSupported;
  }
  int error = 0;
  const KernelLayout* layout = kernel->layout(&error);
  if (layout == nullptr) return error;
  CommandWriter command(kLaunch);
  command.put(kernel->id())
      .put(streamNumber(stream))
      .put(grid)
      .put(block)
      .put(static_cast<uint32_t>(shared_bytes))
      .putBytes(attributes.data(), attributes.size_bytes());
  command.put(layout->size_bytes);
  std::byte* packed = command.reserve(layout->size_bytes);
  for (size_t at = 0; at < layout->parameters.size(); ++at) {
    const auto& parameter = layout->parameters[at];
    std::memcpy(packed + parameter.offset, arguments[at], parameter.size_bytes);
  }
  return connection().post(command, {kernel, streamOf(stream)});
}

struct CallConfiguration {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
thread_local std::vector<CallConfiguration> call_configurations;

}  // namespace
}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(registry().addImage(wrapper));
}

MNEMOSYNE_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
MNEMOSYNE_EXPORT void __cudaUnregisterFatBinary(void**) {}
MNEMOSYNE_EXPORT char __cudaInitModule(void**) { return 1; }

MNEMOSYNE_EXPORT void __cudaRegisterFunction(void** image, const char* stub,
                                             char*, const char* name, int,
                                             void*, void*, void*, void*, int*) {
  registry().addKernel(stub, reinterpret_cast<Image*>(image), name);
}

MNEMOSYNE_EXPORT void __cudaRegisterVar(void** image, char* host, char*,
                                        const char* name, int,
                                        size_t size_bytes, int, int) {
  registry().addVariable(host,
                         {reinterpret_cast<Image*>(image), name, size_bytes});
}

MNEMOSYNE_EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block,
                                                      size_t shared_bytes,
                                                      void* stream) {
  call_configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

MNEMOSYNE_EXPORT int __cudaPopCallConfiguration(Dim3* grid, Dim3* block,
                                                size_t* shared_bytes,
                                                void* stream) {
  if (call_configurations.empty()) return report(kCudaInvalidValue);
  const CallConfiguration& last = call_configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<void**>(stream) = last.stream;
  call_configurations.pop_back();
  return 0;
}

MNEMOSYNE_EXPORT int __cudaGetKernel(void** kernel, const void* stub) {
  *kernel = registry().kernel(stub);
  return *kernel == nullptr ? report(98) : 0;
}

MNEMOSYNE_EXPORT int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block,
                                        void** arguments, size_t shared_bytes,
                                        void* stream) {
  return report(launch(static_cast<Kernel*>(kernel), grid, block, arguments,
                       shared_bytes, stream, {}));
}

MNEMOSYNE_EXPORT int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block,
                                      void** arguments, size_t shared_bytes,
                                      void* stream) {
  return report(launch(registry().kernel(stub), grid, block, arguments,
                       shared_bytes, stream, {}));
}

MNEMOSYNE_EXPORT int cudaLaunchCooperativeKernel(const void* stub, Dim3 grid,
                                                 Dim3 block, void** arguments,
                                                 size_t shared_bytes,
                                                 void* stream) {
  LaunchAttribute cooperative{};
  cooperative.id = 2;  // cudaLaunchAttributeCooperative
  cooperative.value[0] = std::byte{1};
  return report(launch(registry().kernel(stub), grid, block, arguments,
                       shared_bytes, stream, {&cooperative, 1}));
}

MNEMOSYNE_EXPORT int cudaLaunchKernelExC(const LaunchConfig* config,
                                         const void* stub, void** arguments) {
  return report(launch(registry().kernel(stub), config->grid, config->block,
                       arguments, config->shared_memory_bytes, config->stream,
                       {config->attributes, config->num_attributes}));
}

MNEMOSYNE_EXPORT int cudaFuncSetAttribute(const void* stub, int attribute,
                                          int value) {
  Kernel* kernel = registry().kernel(stub);
  if (kernel == nullptr) return report(98);
  return report(kernel->setAttribute(attribute, value));
}

MNEMOSYNE_EXPORT int cudaFuncGetAttributes(FunctionAttributes* attributes,
                                           const void* stub) {
  Kernel* kernel = registry().kernel(stub);
  if (kernel == nullptr) return report(98);
  Answer answer{attributes, sizeof *attributes};
  return report(Connection::instance().call(
      CommandWriter(kKernelAttributes).put(kernel->id()), &answer, {kernel}));
}

MNEMOSYNE_EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* stub, int block, size_t shared_bytes,
    unsigned flags) {
  Kernel* kernel = registry().kernel(stub);
  if (kernel == nullptr) return report(98);
  Answer answer{blocks, sizeof *blocks};
  return report(Connection::instance().call(CommandWriter(kOccupancy)
                                                .put(kernel->id())
                                                .put(block)
                                                .put(uint64_t{shared_bytes})
                                                .put(uint32_t{flags}),
                                            &answer, {kernel}));
}

MNEMOSYNE_EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, const void* stub, int block, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
      blocks, stub, block, shared_bytes, 0);
}

namespace {

struct Global {
  uint64_t address = 0;
  uint64_t size_bytes = 0;
};

int findGlobal(const void* host, Global* found) {
  const Variable* variable = registry().variable(host);
  if (variable == nullptr) return report(13);  // cudaErrorInvalidSymbol
  Answer answer{found, sizeof *found};
  return report(Connection::instance().call(
      CommandWriter(kGlobalAddress)
          .put(variable->image->id())
          .putBytes(variable->name, std::strlen(variable->name)),
      &answer, {variable->image}));
}

}  // namespace

// The address holds until the server ends: a variable of device code is made
// anew in the next one, elsewhere and with its first value.
MNEMOSYNE_EXPORT int cudaGetSymbolAddress(void** address, const void* host) {
  Global global;
  const int error = findGlobal(host, &global);
  *address = reinterpret_cast<void*>(global.address);
  return error;
}

MNEMOSYNE_EXPORT int cudaGetSymbolSize(size_t* size_bytes, const void* host) {
  Global global;
  const int error = findGlobal(host, &global);
  *size_bytes = global.size_bytes;
  return error;
}

// By way of memory of ours: a variable's own address is outside of our range,
// where copy() would take it for host memory.
MNEMOSYNE_EXPORT int cudaMemcpyFromSymbol(void* to, const void* host,
                                          size_t size_bytes, size_t offset,
                                          int) {
  Global global;
  if (const int error = findGlobal(host, &global); error != 0) return error;
  if (size_bytes == 0) return 0;
  void* between = nullptr;
  int error = allocate(&between, size_bytes);
  if (error != 0) return report(error);
  error =
      Connection::instance().post(CommandWriter(kCopy)
                                      .put(uint32_t{0})
                                      .put(reinterpret_cast<uint64_t>(between))
                                      .put(global.address + offset)
                                      .put(uint64_t{size_bytes}));
  if (error == 0) error = copy(to, between, size_bytes, nullptr);
  if (error == 0) error = syncStream(nullptr);
  release(between);
  return report(error);
}

MNEMOSYNE_EXPORT int cudaMemcpyToSymbol(const void* host, const void* from,
                                        size_t size_bytes, size_t offset, int) {
  void* address = nullptr;
  if (const int error = cudaGetSymbolAddress(&address, host); error != 0)
    return error;
  const auto at = reinterpret_cast<uint64_t>(address) + offset;
  const auto* bytes = static_cast<const std::byte*>(from);
  // Not in our range of addresses, so copy() would take it for host memory.
  for (size_t done = 0; done < size_bytes;) {
    const size_t part = std::min(size_bytes - done, kMaxInlineBytes);
    const int error =
        Connection::instance().post(CommandWriter(kCopyInline)
                                        .put(uint32_t{0})
                                        .put(at + done)
                                        .putBytes(bytes + done, part));
    if (error != 0) return report(error);
    done += part;
  }
  return report(syncStream(nullptr));
}
