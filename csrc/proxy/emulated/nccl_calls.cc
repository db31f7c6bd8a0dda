// NCCL: what ranks do together, alone or in groups.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "proxy/emulated/communicator.h"
#include "proxy/emulated/driver.h"

namespace mnemosyne::proxy::emulated {
namespace {

struct Queued {
  std::shared_ptr<Communicator> communicator;
  void* stream;
  Call call;
};

// The group that a thread has open.
thread_local int depth = 0;
thread_local std::vector<Queued> queued;

// All calls of one communicator, as one operation in the first one's stream:
// what the other streams did comes before it, and what they will do behind it.
int submitTogether(const std::vector<Queued>& calls) {
  std::vector<void*> streams;
  std::vector<Call> together;
  for (const Queued& each : calls) {
    if (std::find(streams.begin(), streams.end(), each.stream) ==
        streams.end()) {
      streams.push_back(each.stream);
    }
    together.push_back(each.call);
  }
  std::vector<Point> before;
  for (size_t i = 1; i < streams.size(); ++i) {
    if (device()->pointsOf(streams[i], &before) != kCudaSuccess) {
      return kNcclInvalidArgument;
    }
  }
  Point end;
  const int error = calls[0].communicator->submit(
      streams[0], std::move(together), std::move(before), &end);
  if (error != kNcclSuccess) return error;
  for (size_t i = 1; i < streams.size(); ++i) {
    Operation wait;
    wait.body = [] { return kCudaSuccess; };
    wait.after.push_back(end);
    device()->submit(streams[i], std::move(wait));
  }
  return kNcclSuccess;
}

int submitQueued() {
  std::vector<Queued> calls = std::move(queued);
  queued.clear();
  while (!calls.empty()) {
    const auto first = calls[0].communicator;
    const auto rest = std::stable_partition(
        calls.begin(), calls.end(),
        [&](const Queued& each) { return each.communicator == first; });
    const std::vector<Queued> together(calls.begin(), rest);
    calls.erase(calls.begin(), rest);
    if (const int error = submitTogether(together)) return error;
  }
  return kNcclSuccess;
}

int enqueue(void* handle, void* stream, const Call& call) {
  const auto found = communicator(handle);
  if (found == nullptr) return kNcclInvalidArgument;
  if (const int error = found->check(call)) return error;
  queued.push_back({found, stream, call});
  return depth > 0 ? kNcclSuccess : submitQueued();
}

}  // namespace
}  // namespace mnemosyne::proxy::emulated

using namespace mnemosyne::proxy;
using namespace mnemosyne::proxy::emulated;

MNEMOSYNE_EXPORT int ncclGroupStart() {
  ++depth;
  return kNcclSuccess;
}

MNEMOSYNE_EXPORT int ncclGroupEnd() {
  if (depth == 0) return kNcclInvalidUsage;
  return --depth > 0 ? kNcclSuccess : submitQueued();
}

MNEMOSYNE_EXPORT int ncclAllReduce(const void* from, void* to, size_t count,
                                   int type, int op, void* handle,
                                   void* stream) {
  return enqueue(handle, stream, {Verb::kAllReduce, from, to, count, type, op});
}

MNEMOSYNE_EXPORT int ncclBroadcast(const void* from, void* to, size_t count,
                                   int type, int root, void* handle,
                                   void* stream) {
  return enqueue(handle, stream,
                 {Verb::kBroadcast, from, to, count, type, kSum, root});
}

MNEMOSYNE_EXPORT int ncclBcast(void* buffer, size_t count, int type, int root,
                               void* handle, void* stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, handle, stream);
}

MNEMOSYNE_EXPORT int ncclReduce(const void* from, void* to, size_t count,
                                int type, int op, int root, void* handle,
                                void* stream) {
  return enqueue(handle, stream,
                 {Verb::kReduce, from, to, count, type, op, root});
}

MNEMOSYNE_EXPORT int ncclAllGather(const void* from, void* to, size_t count,
                                   int type, void* handle, void* stream) {
  return enqueue(handle, stream, {Verb::kAllGather, from, to, count, type});
}

MNEMOSYNE_EXPORT int ncclReduceScatter(const void* from, void* to, size_t count,
                                       int type, int op, void* handle,
                                       void* stream) {
  return enqueue(handle, stream,
                 {Verb::kReduceScatter, from, to, count, type, op});
}

MNEMOSYNE_EXPORT int ncclAlltoAll(const void* from, void* to, size_t count,
                                  int type, void* handle, void* stream) {
  return enqueue(handle, stream, {Verb::kAllToAll, from, to, count, type});
}

MNEMOSYNE_EXPORT int ncclSend(const void* from, size_t count, int type,
                              int peer, void* handle, void* stream) {
  return enqueue(handle, stream,
                 {Verb::kSend, from, nullptr, count, type, kSum, peer});
}

MNEMOSYNE_EXPORT int ncclRecv(void* to, size_t count, int type, int peer,
                              void* handle, void* stream) {
  return enqueue(handle, stream,
                 {Verb::kReceive, nullptr, to, count, type, kSum, peer});
}
