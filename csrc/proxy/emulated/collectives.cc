// What a communicator runs in a stream. All of it is made of transfers between
// two ranks; sums are made by whoever wants them, in the order of the ranks.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "proxy/emulated/communicator.h"

namespace mnemosyne::proxy::emulated {
namespace {

// Of which each rank keeps one per peer while it reduces.
constexpr size_t kPieceBytes = 1 << 20;

// The other side of a send is not written to, so it may be const.
std::byte* bytes(const void* at) {
  return static_cast<std::byte*>(const_cast<void*>(at));
}

bool isTransfer(const Call& call) {
  return call.verb == Verb::kSend || call.verb == Verb::kReceive;
}

void copy(const void* from, void* to, size_t size_bytes) {
  if (from != to && size_bytes > 0) std::memmove(to, from, size_bytes);
}

}  // namespace

int Communicator::run(const std::vector<Call>& calls) {
  for (const Call& call : calls) {
    if (!isReachable(call)) return kCudaIllegalAddress;
  }
  static std::atomic<uint64_t> count{0};
  if (device()->options().stalls(count++)) {
    while (!isOver()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  // What is left undone when the communicator is over stays undone: whoever
  // aborts does not look at the result.
  if (!runTransfers(calls)) return kCudaSuccess;
  for (const Call& call : calls) {
    if (!isTransfer(call) && call.count > 0 && !runCollective(call)) break;
  }
  return kCudaSuccess;
}

bool Communicator::isReachable(const Call& call) const {
  const Verb verb = call.verb;
  const bool is_root = call.peer == rank_;
  const auto ranks = static_cast<size_t>(num_ranks_);
  size_t from = call.count, to = call.count;
  if (verb == Verb::kReduceScatter || verb == Verb::kAllToAll) from *= ranks;
  if (verb == Verb::kAllGather || verb == Verb::kAllToAll) to *= ranks;
  if (verb == Verb::kReceive || (verb == Verb::kBroadcast && !is_root))
    from = 0;
  if (verb == Verb::kSend || (verb == Verb::kReduce && !is_root)) to = 0;
  const size_t size = ncclTypeBytes(call.type);
  const Memory& memory = device()->memory();
  const auto reachable = [&](const void* at, size_t count) {
    const auto address = reinterpret_cast<uint64_t>(at);
    return count == 0 || memory.isDevice(address, count * size) ||
           memory.isRegistered(address, count * size);
  };
  return reachable(call.from, from) && reachable(call.to, to);
}

bool Communicator::exchange(std::vector<Transfer> sends,
                            std::vector<Transfer> receives) {
  return stream_wire_->exchange(std::move(sends), std::move(receives),
                                [this] { return isOver(); });
}

bool Communicator::runTransfers(const std::vector<Call>& calls) {
  std::vector<Transfer> sends, receives;
  for (const Call& call : calls) {
    const size_t size_bytes = call.count * ncclTypeBytes(call.type);
    if (call.verb == Verb::kSend) {
      sends.push_back({call.peer, bytes(call.from), size_bytes});
    } else if (call.verb == Verb::kReceive) {
      receives.push_back({call.peer, bytes(call.to), size_bytes});
    }
  }
  return exchange(std::move(sends), std::move(receives));
}

bool Communicator::runCollective(const Call& call) {
  switch (call.verb) {
    case Verb::kBroadcast:
      return broadcast(call);
    case Verb::kAllGather:
      return allGather(call);
    case Verb::kAllToAll:
      return allToAll(call);
    default:
      return reduceAll(call);
  }
}

bool Communicator::broadcast(const Call& call) {
  const size_t size_bytes = call.count * ncclTypeBytes(call.type);
  if (call.peer != rank_) {
    return exchange({}, {{call.peer, bytes(call.to), size_bytes}});
  }
  std::vector<Transfer> sends;
  for (int peer = 0; peer < num_ranks_; ++peer) {
    if (peer != rank_) sends.push_back({peer, bytes(call.from), size_bytes});
  }
  copy(call.from, call.to, size_bytes);
  return exchange(std::move(sends), {});
}

bool Communicator::allGather(const Call& call) {
  const size_t size_bytes = call.count * ncclTypeBytes(call.type);
  std::vector<Transfer> sends, receives;
  for (int peer = 0; peer < num_ranks_; ++peer) {
    std::byte* const place = bytes(call.to) + peer * size_bytes;
    if (peer == rank_) {
      copy(call.from, place, size_bytes);
    } else {
      sends.push_back({peer, bytes(call.from), size_bytes});
      receives.push_back({peer, place, size_bytes});
    }
  }
  return exchange(std::move(sends), std::move(receives));
}

bool Communicator::allToAll(const Call& call) {
  const size_t size_bytes = call.count * ncclTypeBytes(call.type);
  std::vector<Transfer> sends, receives;
  for (int peer = 0; peer < num_ranks_; ++peer) {
    sends.push_back({peer, bytes(call.from) + peer * size_bytes, size_bytes});
    receives.push_back({peer, bytes(call.to) + peer * size_bytes, size_bytes});
  }
  return exchange(std::move(sends), std::move(receives));
}

// All-reduce, reduce and reduce-scatter: they differ in who wants which part.
bool Communicator::reduceAll(Call call) {
  const size_t size = ncclTypeBytes(call.type);
  const bool is_scattered = call.verb == Verb::kReduceScatter;
  std::vector<std::byte> multiplied;
  if (call.factor.has_value()) {
    const size_t count = call.count * (is_scattered ? num_ranks_ : 1);
    multiplied.resize(count * size);
    const Factor& factor = *call.factor;
    scale(call.type, factor.on_device ? bytes(factor.on_device) : factor.number,
          bytes(call.from), multiplied.data(), count);
    call.from = multiplied.data();
    call.op = kSum;
  }
  const auto wants = [&](int rank) {
    return call.verb != Verb::kReduce || rank == call.peer;
  };
  const size_t piece = kPieceBytes / size;
  std::vector<std::byte> received(
      wants(rank_) ? std::min(piece, call.count) * size * num_ranks_ : 0);
  for (size_t done = 0; done < call.count; done += piece) {
    const size_t count = std::min(piece, call.count - done);
    std::vector<Transfer> sends, receives;
    std::vector<const std::byte*> inputs;
    for (int peer = 0; peer < num_ranks_; ++peer) {
      const size_t part = is_scattered ? peer * call.count : 0;
      std::byte* const mine = bytes(call.from) + (part + done) * size;
      std::byte* const theirs = received.data() + peer * count * size;
      if (peer != rank_ && wants(peer)) {
        sends.push_back({peer, mine, count * size});
      }
      if (peer != rank_ && wants(rank_)) {
        receives.push_back({peer, theirs, count * size});
      }
      inputs.push_back(peer == rank_ ? mine : theirs);
    }
    if (!exchange(std::move(sends), std::move(receives))) return false;
    if (!wants(rank_)) continue;
    reduce(call.type, call.op, inputs, bytes(call.to) + done * size, count);
  }
  return true;
}

}  // namespace mnemosyne::proxy::emulated
