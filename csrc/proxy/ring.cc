#include "proxy/ring.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "proxy/command.h"

namespace mnemosyne::proxy {
namespace {

struct RecordHeader {
  uint32_t size_bytes;  // with this header, rounded up; 0: go to the start
  uint32_t payload_bytes;
  uint16_t opcode;
  uint16_t reply;
  uint32_t padding;
  uint64_t index;
};

constexpr size_t kAlignment = 16;

size_t roundUp(size_t size) {
  return (size + kAlignment - 1) & ~(kAlignment - 1);
}

// Lets the other side go on if it sleeps on `word`.
void wake(std::atomic<uint32_t>* word) {
  if (word->load() == 0) return;
  if (word->exchange(0) != 0) futexWakeAll(word);
}

}  // namespace

void futexWait(std::atomic<uint32_t>* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT, value, nullptr, nullptr, 0);
}

void futexWakeAll(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

int numSpins() {
  static const int spins = std::thread::hardware_concurrency() > 4 ? 2000 : 50;
  return spins;
}

void pauseSpin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void RingControl::close() {
  closed.store(1);
  // Always: the side that died may have cleared the word and not woken yet.
  for (auto* word : {&reader_sleeps, &writer_sleeps}) {
    word->store(0);
    futexWakeAll(word);
  }
}

RingWriter::RingWriter(RingControl* control, std::byte* data, size_t size_bytes,
                       WaitClock* since)
    : control_(control), data_(data), size_bytes_(size_bytes), since_(since) {}

bool RingWriter::hasRoom(uint64_t end) {
  if (end - seen_read_ <= size_bytes_) return true;
  seen_read_ = control_->read.load();
  return end - seen_read_ <= size_bytes_;
}

// Until there is room, or the ring is closed.
void RingWriter::waitForRoom(uint64_t end) {
  const Waiting waiting(*since_);
  for (int spins = 0; !hasRoom(end) && control_->closed.load() == 0; ++spins) {
    if (spins < numSpins()) {
      pauseSpin();
      continue;
    }
    control_->writer_sleeps.store(1);
    if (!hasRoom(end) && control_->closed.load() == 0) {
      futexWait(&control_->writer_sleeps, 1);
    }
    control_->writer_sleeps.store(0);
  }
}

bool RingWriter::put(uint16_t opcode, uint16_t reply,
                     std::span<const std::byte> payload) {
  RecordHeader header{};
  header.size_bytes = roundUp(sizeof header + payload.size());
  header.payload_bytes = payload.size();
  header.opcode = opcode;
  header.reply = reply;
  header.index = next_index_;
  uint64_t begin = written_;
  const size_t until_end = size_bytes_ - begin % size_bytes_;
  const bool wraps = header.size_bytes > until_end;
  if (wraps) begin += until_end;
  const uint64_t end = begin + header.size_bytes;
  if (!hasRoom(end)) waitForRoom(end);
  if (control_->closed.load(std::memory_order_relaxed) != 0) return false;
  if (wraps) {
    const uint32_t to_start = 0;
    std::memcpy(data_ + written_ % size_bytes_, &to_start, sizeof to_start);
  }
  std::byte* at = data_ + begin % size_bytes_;
  std::memcpy(at, &header, sizeof header);
  if (!payload.empty()) {
    std::memcpy(at + sizeof header, payload.data(), payload.size());
  }
  written_ = end;
  ++next_index_;
  control_->written.store(written_);  // in front of the look at reader_sleeps
  wake(&control_->reader_sleeps);
  return true;
}

RingReader::RingReader(RingControl* control, const std::byte* data,
                       size_t size_bytes)
    : control_(control), data_(data), size_bytes_(size_bytes) {}

bool RingReader::waitForRecord() {
  for (int spins = 0;; ++spins) {
    if (control_->written.load(std::memory_order_acquire) != read_) return true;
    if (control_->closed.load() != 0) return false;
    if (spins < numSpins()) {
      pauseSpin();
      continue;
    }
    control_->reader_sleeps.store(1);
    if (control_->written.load() == read_ && control_->closed.load() == 0) {
      futexWait(&control_->reader_sleeps, 1);
    }
    control_->reader_sleeps.store(0);
    spins = 0;
  }
}

std::optional<Record> RingReader::next() {
  for (;;) {
    if (!waitForRecord()) return std::nullopt;
    const size_t offset = read_ % size_bytes_;
    uint32_t size_bytes;
    std::memcpy(&size_bytes, data_ + offset, sizeof size_bytes);
    if (size_bytes == 0) {
      read_ += size_bytes_ - offset;
      continue;
    }
    RecordHeader header;
    const uint64_t published =
        control_->written.load(std::memory_order_acquire);
    if (size_bytes < sizeof header || size_bytes % kAlignment != 0 ||
        size_bytes > size_bytes_ - offset || size_bytes > published - read_) {
      throw ProtocolError("a record of the ring has an impossible size");
    }
    std::memcpy(&header, data_ + offset, sizeof header);
    if (header.payload_bytes > size_bytes - sizeof header) {
      throw ProtocolError("a record of the ring is shorter than its payload");
    }
    end_ = read_ + size_bytes;
    return Record{header.index,
                  header.opcode,
                  header.reply,
                  {data_ + offset + sizeof header, header.payload_bytes}};
  }
}

void RingReader::release() {
  read_ = end_;
  control_->read.store(read_);  // in front of the look at writer_sleeps
  wake(&control_->writer_sleeps);
}

}  // namespace mnemosyne::proxy
