// A ring of commands in shared memory: one writer, one reader, in order.
//
// Records have any size up to kMaxPayloadBytes and lie in one piece; one that
// would run over the end of the ring begins at its start. Neither side waits by
// a clock: a reader without work and a writer without room sleep on a futex,
// after a short bounded spin, until the other side or close() wakes them.
// close() is what a side calls that saw the other die.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "proxy/waiting.h"

namespace mnemosyne::proxy {

// What both sides share, besides the bytes. Zeros are an empty ring.
struct RingControl {
  alignas(64) std::atomic<uint64_t> written;  // bytes, ever
  alignas(64) std::atomic<uint64_t> read;     // bytes, ever
  alignas(64) std::atomic<uint32_t> reader_sleeps;
  std::atomic<uint32_t> writer_sleeps;
  std::atomic<uint32_t> closed;

  void close();
};

struct Record {
  uint64_t index;  // of this record, from 0
  uint16_t opcode;
  uint16_t reply;  // the slot that waits for the answer, or kNoReply
  std::span<const std::byte> payload;
};

constexpr uint16_t kNoReply = 0xffff;

class RingWriter {
 public:
  // `size_bytes` is a power of two of at least four of the largest records.
  // `since` tells of waits for room.
  RingWriter(RingControl* control, std::byte* data, size_t size_bytes,
             WaitClock* since);

  // Waits for room. False if the ring was closed.
  bool put(uint16_t opcode, uint16_t reply, std::span<const std::byte> payload);

  uint64_t numRecords() const { return next_index_; }

 private:
  bool hasRoom(uint64_t end);
  void waitForRoom(uint64_t end);

  RingControl* control_;
  std::byte* data_;
  size_t size_bytes_;
  WaitClock* since_;
  uint64_t written_ = 0;
  uint64_t seen_read_ = 0;
  uint64_t next_index_ = 0;
};

class RingReader {
 public:
  RingReader(RingControl* control, const std::byte* data, size_t size_bytes);

  // Waits for a record; nothing if the ring was closed. Its payload stays where
  // it is until release(). Throws ProtocolError on a record that cannot be one.
  std::optional<Record> next();
  void release();

 private:
  bool waitForRecord();

  RingControl* control_;
  const std::byte* data_;
  size_t size_bytes_;
  uint64_t read_ = 0;
  uint64_t end_ = 0;  // of the record that next() returned
};

// Sleeps while `*word` is `value`; returns on a wake or for no reason.
void futexWait(std::atomic<uint32_t>* word, uint32_t value);
void futexWakeAll(std::atomic<uint32_t>* word);

// Turns of a loop worth spending before a sleep: nearly none where a core is
// scarce.
int numSpins();
void pauseSpin();

}  // namespace mnemosyne::proxy
