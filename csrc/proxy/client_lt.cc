// cuBLASLt: descriptors are values, which travel whole with each
// multiplication.
#include <cstring>
#include <unordered_map>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

struct Descriptor {
  std::vector<int64_t> made_with;
  std::map<int, std::vector<std::byte>> attributes;

  int set(int attribute, const void* value, size_t size) {
    const auto* bytes = static_cast<const std::byte*>(value);
    attributes[attribute].assign(bytes, bytes + size);
    return kCublasSuccess;
  }
  void putTo(CommandWriter& command) const {
    command.putBytes(made_with.data(), made_with.size() * sizeof(int64_t));
    command.put(static_cast<uint32_t>(attributes.size()));
    for (const auto& [attribute, value] : attributes) {
      command.put(attribute).putBytes(value.data(), value.size());
    }
  }
};

Descriptor* descriptor(void* made) { return static_cast<Descriptor*>(made); }

int make(void** made, std::vector<int64_t> with) {
  *made = new Descriptor{std::move(with), {}};
  return kCublasSuccess;
}

// Bytes of alpha and beta, by the type in which they are (cudaDataType).
size_t scalarBytes(int64_t type) {
  switch (type) {
    case 1:  // CUDA_R_64F
    case 4:  // CUDA_C_32F
      return 8;
    case 5:  // CUDA_C_64F
      return 16;
    case 2:   // CUDA_R_16F
    case 14:  // CUDA_R_16BF
      return 2;
    default:
      return 4;
  }
}

// CUBLASLT_MATMUL_DESC_POINTER_MODE: 0, the host, unless it was set.
bool scalarsOnHost(const Descriptor& operation) {
  const auto found = operation.attributes.find(2);
  return found == operation.attributes.end() ||
         found->second[0] == std::byte{0};
}

void putScalar(CommandWriter& command, const Descriptor& operation,
               const void* scalar) {
  if (scalarsOnHost(operation)) {
    command.putBytes(scalar, scalarBytes(operation.made_with[1]));
  } else {
    command.putBytes(&scalar, sizeof scalar);
  }
}

}  // namespace
}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT size_t cublasLtGetVersion() {
  size_t version = 0;
  Answer answer{&version, sizeof version};
  Connection::instance().call(CommandWriter(kLtVersion), &answer);
  return version;
}

MNEMOSYNE_EXPORT int cublasLtCreate(void** handle) {
  static int handle_of_all;
  *handle = &handle_of_all;
  return kCublasSuccess;
}
MNEMOSYNE_EXPORT int cublasLtDestroy(void*) { return kCublasSuccess; }

MNEMOSYNE_EXPORT int cublasLtMatmulDescCreate(void** made, int compute_type,
                                              int scale_type) {
  return make(made, {compute_type, scale_type});
}
MNEMOSYNE_EXPORT int cublasLtMatmulDescDestroy(void* made) {
  delete descriptor(made);
  return kCublasSuccess;
}
MNEMOSYNE_EXPORT int cublasLtMatmulDescSetAttribute(void* made, int attribute,
                                                    const void* value,
                                                    size_t size) {
  return descriptor(made)->set(attribute, value, size);
}

MNEMOSYNE_EXPORT int cublasLtMatrixLayoutCreate(void** made, int type,
                                                uint64_t rows, uint64_t columns,
                                                int64_t stride) {
  return make(made, {type, static_cast<int64_t>(rows),
                     static_cast<int64_t>(columns), stride});
}
MNEMOSYNE_EXPORT int cublasLtMatrixLayoutDestroy(void* made) {
  delete descriptor(made);
  return kCublasSuccess;
}
MNEMOSYNE_EXPORT int cublasLtMatrixLayoutSetAttribute(void* made, int attribute,
                                                      const void* value,
                                                      size_t size) {
  return descriptor(made)->set(attribute, value, size);
}

MNEMOSYNE_EXPORT int cublasLtMatmulPreferenceCreate(void** made) {
  return make(made, {});
}
MNEMOSYNE_EXPORT int cublasLtMatmulPreferenceDestroy(void* made) {
  delete descriptor(made);
  return kCublasSuccess;
}
MNEMOSYNE_EXPORT int cublasLtMatmulPreferenceSetAttribute(void* made,
                                                          int attribute,
                                                          const void* value,
                                                          size_t size) {
  return descriptor(made)->set(attribute, value, size);
}

// torch asks before each fused multiplication, with the same question in each
// step; so the answers are kept. They hold for every server on the same kind of
// device.
MNEMOSYNE_EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void* operation,
                                                    void* a, void* b, void* c,
                                                    void* d, void* preference,
                                                    int num_wanted,
                                                    LtHeuristicResult* results,
                                                    int* num_found) {
  static auto* known =
      new std::unordered_map<std::string, std::vector<LtHeuristicResult>>;
  static std::mutex mutex;
  *num_found = 0;
  CommandWriter command(kLtHeuristic);
  for (void* each : {operation, a, b, c, d, preference}) {
    descriptor(each)->putTo(command);
  }
  num_wanted =
      std::min<int>(num_wanted, sizeof(Reply::data) / (sizeof *results));
  command.put(num_wanted);
  const auto payload = command.payload();
  const std::string key(reinterpret_cast<const char*>(payload.data()),
                        payload.size());
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = known->find(key);
    if (found != known->end()) {
      std::copy(found->second.begin(), found->second.end(), results);
      *num_found = static_cast<int>(found->second.size());
      return kCublasSuccess;
    }
  }
  Answer answer{results, num_wanted * sizeof *results};
  const int code = Connection::instance().call(command, &answer);
  if (code != 0) {
    return Connection::instance().isUsable() ? code
                                             : int{kCublasExecutionFailed};
  }
  *num_found = static_cast<int>(answer.got_bytes / sizeof *results);
  std::lock_guard<std::mutex> lock(mutex);
  (*known)[key].assign(results, results + *num_found);
  return kCublasSuccess;
}

MNEMOSYNE_EXPORT int cublasLtMatmul(void*, void* operation, const void* alpha,
                                    const void* a, void* a_layout,
                                    const void* b, void* b_layout,
                                    const void* beta, const void* c,
                                    void* c_layout, void* d, void* d_layout,
                                    const void* algorithm, void* workspace,
                                    size_t workspace_bytes, void* stream) {
  CommandWriter command(kLtMatmul);
  for (void* each : {operation, a_layout, b_layout, c_layout, d_layout}) {
    descriptor(each)->putTo(command);
  }
  putScalar(command, *descriptor(operation), alpha);
  putScalar(command, *descriptor(operation), beta);
  command.put(scalarsOnHost(*descriptor(operation)));
  for (const void* each : {a, b, c, static_cast<const void*>(d),
                           static_cast<const void*>(workspace)}) {
    command.put(reinterpret_cast<uint64_t>(each));
  }
  command.put(uint64_t{workspace_bytes});
  command.putBytes(algorithm, algorithm == nullptr ? 0 : 64);
  command.put(streamId(stream));
  return postForward(command, Library::kCublasLt);
}
