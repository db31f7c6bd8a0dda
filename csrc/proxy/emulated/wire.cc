#include "proxy/emulated/wire.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

namespace mnemosyne::proxy::emulated {
namespace {

constexpr size_t kRingBytes = 64 << 10;
constexpr size_t kBellBytes = 64;  // a cache line

// Not the private kind: the word is shared by processes.
void futex(const void* word, int operation, uint32_t value) {
  syscall(SYS_futex, word, operation, value, nullptr, nullptr, 0);
}

// The transfers that may move: the first of each peer that is not done.
template <typename Move>
void moveFirsts(std::vector<Transfer>& transfers, Move&& move, bool* moved,
                bool* left) {
  std::vector<int> busy;
  for (Transfer& transfer : transfers) {
    if (transfer.done_bytes == transfer.size_bytes) continue;
    if (std::find(busy.begin(), busy.end(), transfer.peer) == busy.end()) {
      *moved |= move(transfer);
    }
    if (transfer.done_bytes == transfer.size_bytes) continue;
    busy.push_back(transfer.peer);
    *left = true;
  }
}

// What a rank sends itself, in order.
void copyOwn(std::vector<Transfer>& sends, std::vector<Transfer>& receives,
             int rank) {
  auto receive = receives.begin();
  for (Transfer& send : sends) {
    if (send.peer != rank) continue;
    receive = std::find_if(receive, receives.end(), [&](const Transfer& each) {
      return each.peer == rank;
    });
    if (receive == receives.end()) return;
    const size_t size_bytes = std::min(send.size_bytes, receive->size_bytes);
    if (size_bytes > 0) std::memmove(receive->data, send.data, size_bytes);
    send.done_bytes = send.size_bytes;
    receive->done_bytes = receive->size_bytes;
    ++receive;
  }
}

}  // namespace

struct Wire::Ring {
  // Both only grow; their difference is what lies in the ring.
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  alignas(64) std::byte bytes[kRingBytes];
};

size_t Wire::segmentBytes(int num_ranks) {
  const size_t ranks = static_cast<size_t>(num_ranks);
  return kNumWires * (ranks * kBellBytes + ranks * ranks * sizeof(Ring));
}

Wire::Wire(Segment segment, int number, int num_ranks, int rank)
    : segment_(std::move(segment)),
      number_(number),
      num_ranks_(num_ranks),
      rank_(rank) {}

Wire::Bell& Wire::bell(int rank) const {
  const size_t index = static_cast<size_t>(number_ * num_ranks_ + rank);
  return *reinterpret_cast<Bell*>(segment_->data() + index * kBellBytes);
}

Wire::Ring& Wire::ring(int from, int to) const {
  const size_t index =
      static_cast<size_t>((number_ * num_ranks_ + from) * num_ranks_ + to);
  std::byte* const rings =
      segment_->data() + size_t{kNumWires} * num_ranks_ * kBellBytes;
  return *reinterpret_cast<Ring*>(rings + index * sizeof(Ring));
}

void Wire::ringBell(int rank) const {
  Bell& of = bell(rank);
  of.fetch_add(1);
  futex(&of, FUTEX_WAKE, INT_MAX);
}

void Wire::wake() {
  if (segment_ != nullptr) ringBell(rank_);
}

bool Wire::send(Transfer& transfer) const {
  Ring& to = ring(rank_, transfer.peer);
  const uint64_t written = to.written.load();
  const uint64_t room = kRingBytes - (written - to.read.load());
  const size_t at = written % kRingBytes;
  const size_t size_bytes =
      std::min({static_cast<size_t>(room), kRingBytes - at,
                transfer.size_bytes - transfer.done_bytes});
  if (size_bytes == 0) return false;
  std::memcpy(to.bytes + at, transfer.data + transfer.done_bytes, size_bytes);
  transfer.done_bytes += size_bytes;
  to.written.store(written + size_bytes);
  ringBell(transfer.peer);
  return true;
}

bool Wire::receive(Transfer& transfer) const {
  Ring& from = ring(transfer.peer, rank_);
  const uint64_t read = from.read.load();
  const uint64_t there = from.written.load() - read;
  const size_t at = read % kRingBytes;
  const size_t size_bytes =
      std::min({static_cast<size_t>(there), kRingBytes - at,
                transfer.size_bytes - transfer.done_bytes});
  if (size_bytes == 0) return false;
  std::memcpy(transfer.data + transfer.done_bytes, from.bytes + at, size_bytes);
  transfer.done_bytes += size_bytes;
  from.read.store(read + size_bytes);
  ringBell(transfer.peer);
  return true;
}

bool Wire::exchange(std::vector<Transfer> sends, std::vector<Transfer> receives,
                    const std::function<bool()>& stop) {
  copyOwn(sends, receives, rank_);
  for (;;) {
    // Read first: what happens from here on changes it, and ends the sleep.
    const uint32_t rung = segment_ == nullptr ? 0 : bell(rank_).load();
    bool moved = false, left = false;
    moveFirsts(
        sends, [&](Transfer& each) { return send(each); }, &moved, &left);
    moveFirsts(
        receives, [&](Transfer& each) { return receive(each); }, &moved, &left);
    if (!left) return true;
    if (stop()) return false;
    if (!moved) futex(&bell(rank_), FUTEX_WAIT, rung);
  }
}

}  // namespace mnemosyne::proxy::emulated
