// cuBLAS handles: what is set on one is kept here, and travels with each call.
#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

struct BlasHandle {
  uint32_t id = nextId();
  void* stream = nullptr;
  int math_mode = 0;
  int pointer_mode = 0;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

BlasHandle* blas(void* handle) { return static_cast<BlasHandle*>(handle); }

// What the command that this thread is making needs the server to know.
thread_local std::vector<Stream*> needed;
thread_local bool names_lost_comm = false;

struct DeferredCommand {
  uint16_t opcode;
  std::vector<std::byte> payload;
};
thread_local int group_depth = 0;
thread_local std::vector<DeferredCommand> group;

int translate(int error, Library library) {
  if (error == 0) return 0;
  report(error);
  return library == Library::kNccl ? int{kNcclUnhandledCudaError}
                                   : int{kCublasExecutionFailed};
}

}  // namespace

uint32_t streamId(void* stream) {
  if (Stream* record = streamOf(stream)) needed.push_back(record);
  return streamNumber(stream);
}

CublasPointerMode pointerMode(void* handle) {
  return static_cast<CublasPointerMode>(blas(handle)->pointer_mode);
}

void putCublas(CommandWriter& command, void* handle) {
  const BlasHandle& of = *blas(handle);
  command.put(CublasState{
      of.id, streamId(of.stream), of.math_mode, of.pointer_mode,
      reinterpret_cast<uint64_t>(of.workspace), of.workspace_bytes});
}

void markLostComm() { names_lost_comm = true; }

int postForward(const CommandWriter& command, Library library) {
  auto& connection = Connection::instance();
  const auto needs = std::exchange(needed, {});
  int error = 0;
  if (std::exchange(names_lost_comm, false)) {
    error = connection.isUsable() ? int{kNcclInvalidUsage}
                                  : translate(connection.error(), library);
  }
  // Streams first: a group of NCCL is sent in one piece, and defines nothing.
  if (library == Library::kNccl && group_depth > 0) {
    for (Stream* stream : needs) {
      if (error == 0) error = connection.define(stream);
    }
    const auto payload = command.payload();
    if (error == 0) {
      group.push_back({command.opcode(), {payload.begin(), payload.end()}});
    }
    // Other calls tell of a loss: torch does not end a group in which one
    // fails.
    return 0;
  }
  if (error != 0) return error;
  error = needs.empty() ? connection.post(command)
                        : connection.post(command, {needs.front()});
  return translate(error, library);
}

int startGroup() {
  ++group_depth;
  return 0;
}

// Nor does this: torch also ends groups while it unwinds, where one more error
// would end the process.
int endGroup() {
  // torch ends its groups before it makes a communicator, and again where that
  // fails; an error here would leave its own count of them wrong for ever.
  if (group_depth == 0) return 0;
  if (--group_depth > 0) return 0;
  const auto commands = std::exchange(group, {});
  auto& connection = Connection::instance();
  if (commands.empty() || !connection.isUsable()) return 0;
  std::lock_guard<std::mutex> lock(connection.mutex());
  int error = connection.put(CommandWriter(kNcclGroupStart));
  for (const auto& command : commands) {
    if (error != 0) break;
    CommandWriter again(command.opcode);
    again.putAll(command.payload);
    error = connection.put(again);
  }
  if (error == 0) connection.put(CommandWriter(kNcclGroupEnd));
  return 0;
}

}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT int cublasCreate_v2(void** handle) {
  *handle = new BlasHandle;
  return 0;
}

MNEMOSYNE_EXPORT int cublasDestroy_v2(void* handle) {
  auto& connection = Connection::instance();
  if (connection.isUsable()) {
    connection.post(CommandWriter(kDestroyCublas).put(blas(handle)->id));
  }
  delete blas(handle);
  return 0;
}

MNEMOSYNE_EXPORT int cublasSetStream_v2(void* handle, void* stream) {
  blas(handle)->stream = stream;
  // As in cuBLAS: a new stream takes the handle's own workspace again.
  blas(handle)->workspace = nullptr;
  blas(handle)->workspace_bytes = 0;
  return 0;
}

MNEMOSYNE_EXPORT int cublasGetStream_v2(void* handle, void** stream) {
  *stream = blas(handle)->stream;
  return 0;
}

MNEMOSYNE_EXPORT int cublasSetMathMode(void* handle, int mode) {
  blas(handle)->math_mode = mode;
  return 0;
}

MNEMOSYNE_EXPORT int cublasGetMathMode(void* handle, int* mode) {
  *mode = blas(handle)->math_mode;
  return 0;
}

MNEMOSYNE_EXPORT int cublasSetPointerMode_v2(void* handle, int mode) {
  blas(handle)->pointer_mode = mode;
  return 0;
}

MNEMOSYNE_EXPORT int cublasGetPointerMode_v2(void* handle, int* mode) {
  *mode = blas(handle)->pointer_mode;
  return 0;
}

MNEMOSYNE_EXPORT int cublasSetWorkspace_v2(void* handle, void* workspace,
                                           size_t bytes) {
  blas(handle)->workspace = workspace;
  blas(handle)->workspace_bytes = bytes;
  return 0;
}
