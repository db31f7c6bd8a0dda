#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>

#include "proxy/server.h"

namespace mnemosyne::proxy {
namespace {

// NCCL says only when it is asked that it is done with something.
constexpr std::chrono::microseconds kNcclPoll{200};

// The head of ncclConfig_t, as of the version that it names.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
};

}  // namespace

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

// Requires: comms_mutex_.
void* Server::comm(uint32_t id) {
  const auto found = comms_.find(id);
  return found == comms_.end() ? nullptr : found->second;
}

// What NCCL says of it, an ncclResult_t. Requires: comms_mutex_.
int Server::commState(void* comm) {
  auto* ask = libraries_.function<int(void*, int*)>(Library::kNccl,
                                                    "ncclCommGetAsyncError");
  int state = 0;
  const int code = ask(comm, &state);
  return code != 0 ? code : state;
}

// A library says that something went wrong; the driver may know better what.
void Server::failed(Library library, const char* name, int code) {
  if (code == 0) return;
  if (library == Library::kNccl && code == kNcclInProgress) {
    return waitForComms();
  }
  if (library == Library::kCuda || library == Library::kCudart) {
    check(code, name);
    return;
  }
  std::fprintf(stderr, "mnemosyne-proxy: %s gives error %d\n", name, code);
  const int device = driver_->cuStreamQuery(nullptr);
  if (library == Library::kNccl && !endsDevice(device)) {
    // Of the communicator, or of a peer: this device is as good as before.
    segment_->comm_error = code;
    return;
  }
  check(device != 0 && device != kCudaNotReady ? device : int{kCudaUnknown},
        name);
}

// A communicator that does not block can be aborted while it is made, too.
void Server::initComm(CommandReader& reader, Responder responder) {
  const auto id = reader.get<uint32_t>();
  const auto num_ranks = reader.get<int32_t>();
  const auto unique_id = reader.get<NcclUniqueId>();
  const auto rank = reader.get<int32_t>();
  auto* init =
      libraries_.function<int(void**, int, NcclUniqueId, int, NcclConfig*)>(
          Library::kNccl, "ncclCommInitRankConfig");
  {
    std::lock_guard<std::mutex> lock(comms_mutex_);
    segment_->comm_error = 0;  // that of one that was aborted
    if (aborted_comms_.contains(id)) return responder.answer(kNcclRemoteError);
    NcclConfig config;
    void* made = nullptr;
    const int code = init(&made, num_ranks, unique_id, rank, &config);
    if (code != 0 && code != kNcclInProgress) return responder.answer(code);
    comms_[id] = made;
  }
  // Waits for the other ranks.
  later([this, id, responder] {
    for (;; std::this_thread::sleep_for(kNcclPoll)) {
      std::lock_guard<std::mutex> lock(comms_mutex_);
      const auto found = comms_.find(id);
      if (found == comms_.end()) return responder.answer(kNcclRemoteError);
      const int state = commState(found->second);
      if (state == kNcclInProgress) continue;
      if (state != 0) {
        auto* abort =
            libraries_.function<int(void*)>(Library::kNccl, "ncclCommAbort");
        abort(found->second);
        comms_.erase(found);
      }
      return responder.answer(state);
    }
  });
}

// NCCL goes on with the last call on threads of its own; what follows in the
// stream must come behind it. Requires: comms_mutex_.
void Server::waitForComms() {
  const auto is_busy = [this] {
    return std::ranges::any_of(comms_, [this](const auto& each) {
      return commState(each.second) == kNcclInProgress;
    });
  };
  while (is_busy()) {
    comms_mutex_.unlock();
    std::this_thread::sleep_for(kNcclPoll);
    comms_mutex_.lock();
  }
}

// What is wrong with any communicator, an ncclResult_t.
int Server::commError() {
  std::lock_guard<std::mutex> lock(comms_mutex_);
  for (const auto& [id, comm] : comms_) {
    const int state = commState(comm);
    if (state != 0 && state != kNcclInProgress) return state;
  }
  return segment_->comm_error;
}

// Called beside the ring: it may stand still behind the communicator, or the
// command that makes it may still lie there.
void Server::abortComm(uint32_t id) {
  std::lock_guard<std::mutex> lock(comms_mutex_);
  aborted_comms_.insert(id);
  const auto found = comms_.find(id);
  if (found == comms_.end()) return;
  void* const aborted = found->second;
  comms_.erase(found);
  enterThread();
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
    case kNcclErrors:
      responder.answer(commError());
      break;
    case kNcclInit:
      initComm(reader, responder);
      break;
    case kNcclDestroy: {
      const auto id = reader.get<uint32_t>();
      void* destroyed = nullptr;
      {
        std::lock_guard<std::mutex> lock(comms_mutex_);
        destroyed = comm(id);
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
    case kNcclGroupEnd: {
      const char* name =
          opcode == kNcclGroupStart ? "ncclGroupStart" : "ncclGroupEnd";
      std::lock_guard<std::mutex> lock(comms_mutex_);
      failed(Library::kNccl, name, nccl(name)());
      break;
    }
    default:
      throw ProtocolError("no such command: " + std::to_string(opcode));
  }
}

}  // namespace mnemosyne::proxy
