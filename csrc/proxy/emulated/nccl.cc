// NCCL: communicators.
#include <climits>
#include <cstring>
#include <map>
#include <memory>
#include <thread>

#include "proxy/emulated/communicator.h"
#include "proxy/emulated/driver.h"

namespace mnemosyne::proxy::emulated {
namespace {

std::mutex communicators_mutex;
std::map<void*, std::shared_ptr<Communicator>>& communicators() {
  static auto* const all = new std::map<void*, std::shared_ptr<Communicator>>;
  return *all;
}

// With the device broken nobody waits for a peer any more.
void wakeAll() {
  std::lock_guard<std::mutex> lock(communicators_mutex);
  for (const auto& [handle, each] : communicators()) each->wake();
}

std::shared_ptr<Communicator> take(void* handle) {
  std::lock_guard<std::mutex> lock(communicators_mutex);
  const auto node = communicators().extract(handle);
  return node.empty() ? nullptr : node.mapped();
}

struct Config {  // the head of ncclConfig_t
  size_t size;
  unsigned magic;
  unsigned version;
  int blocking;  // 0: calls that wait return kNcclInProgress instead
};

bool isBlocking(const Config* config) {
  return config == nullptr || config->blocking != 0;  // unset: INT_MIN
}

// Makes a communicator and opens it, here or, if it shall not block, on a
// thread of its own.
int make(void** handle, const NcclUniqueId& id, int num_ranks, int rank,
         const Config* config) {
  if (handle == nullptr || num_ranks < 1 || rank < 0 || rank >= num_ranks) {
    return kNcclInvalidArgument;
  }
  if (libraryError() != kCudaSuccess) return kNcclUnhandledCudaError;
  static std::once_flag once;
  std::call_once(once, [] { device()->onFailure(wakeAll); });
  auto made = std::make_shared<Communicator>(num_ranks, rank);
  {
    std::lock_guard<std::mutex> lock(communicators_mutex);
    *handle = made.get();
    communicators()[*handle] = made;
  }
  if (!isBlocking(config)) {
    std::thread([made, id] { made->open(id); }).detach();
    return kNcclInProgress;
  }
  made->open(id);
  const int error = made->error();
  if (error != kNcclSuccess) {
    take(*handle);
    *handle = nullptr;
  }
  return error;
}

}  // namespace

std::shared_ptr<Communicator> communicator(void* handle) {
  std::lock_guard<std::mutex> lock(communicators_mutex);
  const auto found = communicators().find(handle);
  return found == communicators().end() ? nullptr : found->second;
}

}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int ncclGetVersion(int* version) {
  if (version == nullptr) return kNcclInvalidArgument;
  *version = 22907;
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT const char* ncclGetErrorString(int error) {
  switch (error) {
    case kNcclSuccess:
      return "no error";
    case kNcclUnhandledCudaError:
      return "unhandled cuda error";
    case kNcclSystemError:
      return "unhandled system error";
    case kNcclInternalError:
      return "internal error";
    case kNcclInvalidArgument:
      return "invalid argument";
    case kNcclInvalidUsage:
      return "invalid usage";
    case kNcclRemoteError:
      return "remote process exited or there was a network error";
    case kNcclInProgress:
      return "NCCL operation in progress";
    default:
      return "unknown result code";
  }
}

MNEMOSYNE_EXPORT const char* ncclGetLastError(void* /*communicator*/) {
  return "";
}

MNEMOSYNE_EXPORT int ncclGetUniqueId(NcclUniqueId* id) {
  return id == nullptr ? kNcclInvalidArgument : openMeeting(id);
}

MNEMOSYNE_EXPORT int ncclCommInitRankConfig(void** handle, int num_ranks,
                                            NcclUniqueId id, int rank,
                                            Config* config) {
  return make(handle, id, num_ranks, rank, config);
}

MNEMOSYNE_EXPORT int ncclCommInitRank(void** handle, int num_ranks,
                                      NcclUniqueId id, int rank) {
  return make(handle, id, num_ranks, rank, nullptr);
}

// All ranks have the same ids, so that the first one does.
MNEMOSYNE_EXPORT int ncclCommInitRankScalable(void** handle, int num_ranks,
                                              int rank, int num_ids,
                                              NcclUniqueId* ids,
                                              Config* config) {
  if (num_ids < 1 || ids == nullptr) return kNcclInvalidArgument;
  return make(handle, ids[0], num_ranks, rank, config);
}

// Waits for the other ranks, also where the new communicator shall not block.
MNEMOSYNE_EXPORT int ncclCommSplit(void* handle, int color, int key,
                                   void** new_handle, Config* config) {
  const auto parent = communicator(handle);
  if (parent == nullptr || new_handle == nullptr) return kNcclInvalidArgument;
  if (const int error = parent->error()) return error;
  *new_handle = nullptr;
  Communicator::Part part;
  const int error = parent->split(color, key, &part);
  if (error != kNcclSuccess || part.num_ranks == 0) return error;
  return make(new_handle, part.id, part.num_ranks, part.rank, config);
}

MNEMOSYNE_EXPORT int ncclCommCount(void* handle, int* count) {
  const auto found = communicator(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  *count = found->numRanks();
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclCommUserRank(void* handle, int* rank) {
  const auto found = communicator(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  *rank = found->rank();
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclCommCuDevice(void* handle, int* ordinal) {
  if (communicator(handle) == nullptr) return kNcclInvalidArgument;
  *ordinal = 0;
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclCommGetAsyncError(void* handle, int* error) {
  const auto found = communicator(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  *error = found->error();
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclCommFinalize(void* handle) {
  const auto found = communicator(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  found->finalize();
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclCommDestroy(void* handle) {
  const auto found = communicator(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  found->finalize();
  take(handle);
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclCommAbort(void* handle) {
  const auto found = take(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  found->abort();
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclRedOpCreatePreMulSum(int* op, void* factor, int type,
                                              int residence, void* handle) {
  constexpr int kOnDevice = 0;
  const auto found = communicator(handle);
  if (found == nullptr || op == nullptr || factor == nullptr ||
      !isReducible(type)) {
    return kNcclInvalidArgument;
  }
  Factor made = {type, nullptr, {}};
  if (residence == kOnDevice) {
    made.on_device = factor;
  } else {
    std::memcpy(made.number, factor, ncclTypeBytes(type));
  }
  *op = found->addFactor(made);
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclRedOpDestroy(int op, void* handle) {
  const auto found = communicator(handle);
  const bool dropped = found != nullptr && found->dropFactor(op);
  return dropped ? kNcclSuccess : kNcclInvalidArgument;
}
