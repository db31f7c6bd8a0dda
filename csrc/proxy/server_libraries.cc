#include <cstdio>

#include "proxy/server.h"

namespace mnemosyne::proxy {

// The handle, in the state in which the call wants it.
void* Server::cublas(CommandReader& reader) {
  const auto want = reader.get<CublasState>();
  Cublas& handle = cublas_[want.id];
  if (handle.real == nullptr) {
    auto* create =
        libraries_.function<int(void**)>(Library::kCublas, "cublasCreate_v2");
    failed(Library::kCublas, "cublasCreate_v2", create(&handle.real));
    handle.state = {want.id, 0, 0, 0, 0, 0};
  }
  if (handle.state == want) return handle.real;
  // The workspace comes last: setting a stream takes the handle's own one
  // again.
  auto* set_stream = libraries_.function<int(void*, void*)>(
      Library::kCublas, "cublasSetStream_v2");
  auto* set_math = libraries_.function<int(void*, int)>(Library::kCublas,
                                                        "cublasSetMathMode");
  auto* set_pointer = libraries_.function<int(void*, int)>(
      Library::kCublas, "cublasSetPointerMode_v2");
  auto* set_workspace = libraries_.function<int(void*, void*, size_t)>(
      Library::kCublas, "cublasSetWorkspace_v2");
  int code = set_stream(handle.real, stream(want.stream));
  if (code == 0) code = set_math(handle.real, want.math_mode);
  if (code == 0) code = set_pointer(handle.real, want.pointer_mode);
  if (code == 0 && want.workspace != 0) {
    code = set_workspace(handle.real, reinterpret_cast<void*>(want.workspace),
                         want.workspace_bytes);
  }
  failed(Library::kCublas, "the set-up of a handle", code);
  handle.state = want;
  return handle.real;
}

void* Server::comm(uint32_t id) {
  std::lock_guard<std::mutex> lock(comms_mutex_);
  const auto found = comms_.find(id);
  return found == comms_.end() ? nullptr : found->second;
}

// A library says that something went wrong; the driver may know better what.
void Server::failed(Library library, const char* name, int code) {
  if (code == 0) return;
  if (library == Library::kNccl && code == kNcclInProgress) return;
  if (library == Library::kCuda || library == Library::kCudart) {
    check(code, name);
    return;
  }
  std::fprintf(stderr, "mnemosyne-proxy: %s gives error %d\n", name, code);
  const int device = driver_->cuStreamQuery(nullptr);
  check(device != 0 && device != kCudaNotReady ? device : int{kCudaUnknown},
        name);
}

void Server::initComm(CommandReader& reader, Responder responder) {
  const auto id = reader.get<uint32_t>();
  const auto num_ranks = reader.get<int32_t>();
  const auto unique_id = reader.get<NcclUniqueId>();
  const auto rank = reader.get<int32_t>();
  // Waits for the other ranks.
  later([this, id, num_ranks, unique_id, rank, responder] {
    auto* init = libraries_.function<int(void**, int, NcclUniqueId, int)>(
        Library::kNccl, "ncclCommInitRank");
    void* made = nullptr;
    const int code = init(&made, num_ranks, unique_id, rank);
    if (code == 0) {
      std::lock_guard<std::mutex> lock(comms_mutex_);
      comms_[id] = made;
    }
    responder.answer(code);
  });
}

// Called beside the ring: it may stand still behind the communicator.
void Server::abortComm(uint32_t id) {
  void* aborted = nullptr;
  {
    std::lock_guard<std::mutex> lock(comms_mutex_);
    const auto found = comms_.find(id);
    if (found == comms_.end()) return;
    aborted = found->second;
    comms_.erase(found);
  }
  if (context_ != nullptr) driver_->cuCtxSetCurrent(context_);
  libraries_.function<int(void*)>(Library::kNccl, "ncclCommAbort")(aborted);
}

void Server::executeLibraries(uint16_t opcode, CommandReader& reader,
                              Responder responder) {
  const auto nccl = [this](const char* name) {
    return libraries_.function<int()>(Library::kNccl, name);
  };
  switch (opcode) {
    case kDestroyCublas: {
      const auto found = cublas_.find(reader.get<uint32_t>());
      if (found == cublas_.end()) break;
      auto* destroy =
          libraries_.function<int(void*)>(Library::kCublas, "cublasDestroy_v2");
      failed(Library::kCublas, "cublasDestroy_v2", destroy(found->second.real));
      cublas_.erase(found);
      break;
    }
    case kLtVersion: {
      auto* get = libraries_.function<size_t()>(Library::kCublasLt,
                                                "cublasLtGetVersion");
      responder.answerWith(0, get());
      break;
    }
    case kLtHeuristic:
      ltHeuristic(reader, responder);
      break;
    case kLtMatmul:
      ltMatmul(reader);
      break;
    case kNcclVersion: {
      int version = 0;
      auto* get =
          libraries_.function<int(int*)>(Library::kNccl, "ncclGetVersion");
      const int code = get(&version);
      responder.answerWith(code, version);
      break;
    }
    case kNcclUniqueId: {
      NcclUniqueId id{};
      auto* get = libraries_.function<int(NcclUniqueId*)>(Library::kNccl,
                                                          "ncclGetUniqueId");
      const int code = get(&id);
      responder.answerWith(code, id);
      break;
    }
    case kNcclInit:
      initComm(reader, responder);
      break;
    case kNcclDestroy: {
      const auto id = reader.get<uint32_t>();
      void* destroyed = comm(id);
      {
        std::lock_guard<std::mutex> lock(comms_mutex_);
        comms_.erase(id);
      }
      later([this, destroyed, responder] {
        auto* destroy =
            libraries_.function<int(void*)>(Library::kNccl, "ncclCommDestroy");
        responder.answer(destroyed == nullptr ? int{kNcclSuccess}
                                              : destroy(destroyed));
      });
      break;
    }
    case kNcclGroupStart:
      failed(Library::kNccl, "ncclGroupStart", nccl("ncclGroupStart")());
      break;
    case kNcclGroupEnd:
      failed(Library::kNccl, "ncclGroupEnd", nccl("ncclGroupEnd")());
      break;
    default:
      throw ProtocolError("no such command: " + std::to_string(opcode));
  }
}

}  // namespace mnemosyne::proxy
