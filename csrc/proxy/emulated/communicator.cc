#include "proxy/emulated/communicator.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace mnemosyne::proxy::emulated {
namespace {

constexpr int kStreamWire = 0;
constexpr int kHostWire = 1;

}  // namespace

void Communicator::open(const NcclUniqueId& id) {
  Segment segment;
  const int error = visit_.join(id, num_ranks_, rank_, &segment);
  if (error == kNcclSuccess) {
    stream_wire_ =
        std::make_unique<Wire>(segment, kStreamWire, num_ranks_, rank_);
    host_wire_ = std::make_unique<Wire>(segment, kHostWire, num_ranks_, rank_);
  }
  open_error_ = error;
}

int Communicator::error() const {
  const int error = open_error_;
  if (error == kNcclSuccess && device()->error() != kCudaSuccess) {
    return kNcclUnhandledCudaError;
  }
  return error;
}

bool Communicator::isOver() const {
  return is_aborted_ || device()->error() != kCudaSuccess;
}

void Communicator::wake() {
  if (open_error_ != kNcclSuccess) return;
  stream_wire_->wake();
  host_wire_->wake();
}

void Communicator::abort() {
  is_aborted_ = true;
  visit_.cancel();
  wake();
}

void Communicator::finalize() {
  Point last;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last = last_;
  }
  last.wait();
}

int Communicator::addFactor(const Factor& factor) {
  std::lock_guard<std::mutex> lock(mutex_);
  factors_[next_op_] = factor;
  return next_op_++;
}

bool Communicator::dropFactor(int op) {
  std::lock_guard<std::mutex> lock(mutex_);
  return factors_.erase(op) > 0;
}

int Communicator::check(const Call& call) const {
  if (const int wrong = error()) {
    return wrong == kNcclInProgress ? kNcclInvalidArgument : wrong;
  }
  if (ncclTypeBytes(call.type) == 0 || call.peer < 0 ||
      call.peer >= num_ranks_) {
    return kNcclInvalidArgument;
  }
  const bool reduces = call.verb == Verb::kAllReduce ||
                       call.verb == Verb::kReduce ||
                       call.verb == Verb::kReduceScatter;
  if (!reduces) return kNcclSuccess;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto factor = factors_.find(call.op);
  const bool known = factor == factors_.end()
                         ? call.op >= kSum && call.op <= kAverage
                         : factor->second.type == call.type;
  return known && isReducible(call.type) ? kNcclSuccess : kNcclInvalidArgument;
}

int Communicator::submit(void* stream, std::vector<Call> calls,
                         std::vector<Point> after, Point* end) {
  std::lock_guard<std::mutex> lock(mutex_);
  Operation operation;
  operation.is_counted = true;
  // A factor may be dropped before it is used, so it goes along.
  for (Call& call : calls) {
    const auto factor = factors_.find(call.op);
    if (factor != factors_.end()) call.factor = factor->second;
  }
  operation.body = [self = shared_from_this(), calls = std::move(calls)] {
    return self->run(calls);
  };
  operation.after = std::move(after);
  // Those of one communicator run in the order of their calls, whatever their
  // streams.
  operation.after.push_back(last_);
  if (device()->submit(stream, std::move(operation), &last_) != kCudaSuccess) {
    return kNcclInvalidArgument;
  }
  *end = last_;
  return kNcclSuccess;
}

int Communicator::split(int color, int key, Part* part) {
  std::lock_guard<std::mutex> lock(host_mutex_);
  const auto stop = [this] { return isOver(); };
  struct Wish {
    int color, key, rank;
  };
  std::vector<Wish> wishes(num_ranks_);
  wishes[rank_] = {color, key, rank_};
  std::vector<Transfer> sends, receives;
  const auto bytes = [](auto& of) { return reinterpret_cast<std::byte*>(&of); };
  for (int peer = 0; peer < num_ranks_; ++peer) {
    if (peer == rank_) continue;
    sends.push_back({peer, bytes(wishes[rank_]), sizeof(Wish)});
    receives.push_back({peer, bytes(wishes[peer]), sizeof(Wish)});
  }
  if (!host_wire_->exchange(sends, receives, stop)) return kNcclInternalError;
  *part = {};
  if (color < 0) return kNcclSuccess;
  std::erase_if(wishes, [&](const Wish& wish) { return wish.color != color; });
  std::sort(wishes.begin(), wishes.end(), [](const Wish& a, const Wish& b) {
    return std::tie(a.key, a.rank) < std::tie(b.key, b.rank);
  });
  part->num_ranks = static_cast<int>(wishes.size());
  while (wishes[part->rank].rank != rank_) ++part->rank;
  // The first of them opens the meeting.
  sends.clear();
  receives.clear();
  if (part->rank != 0) {
    receives.push_back({wishes[0].rank, part->id.bytes, sizeof part->id});
  } else if (part->num_ranks > 1) {
    if (const int error = openMeeting(&part->id)) return error;
    for (const Wish& wish : wishes) {
      if (wish.rank == rank_) continue;
      sends.push_back({wish.rank, part->id.bytes, sizeof part->id});
    }
  }
  return host_wire_->exchange(sends, receives, stop) ? kNcclSuccess
                                                     : kNcclInternalError;
}

}  // namespace mnemosyne::proxy::emulated
