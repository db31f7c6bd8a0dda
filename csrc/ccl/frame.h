// What goes over a link: frames of one header and at most one chunk of payload.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

namespace mnemosyne::ccl {

enum class FrameType : uint8_t {
  kData = 1,  // one chunk of a message
  kRequest,   // "I have this message for you", no payload
  kGrant,     // "send it, its buffer is ready", no payload
  kCredit,    // gives `total` bytes of the eager window back
  kMarker,    // everything after this is of `epoch`; `total`: Standing::members
  kReject,    // "your message does not fit mine"
  kFarewell,  // the sender closes in good order
  kClose,     // the sender's part in a group is over; `total` is a Closing
};

// Where a worker is: its epoch, and a digest of the members that the epoch has
// for it. They must be the same for all.
struct Standing {
  int64_t epoch = -1;
  uint64_t members = 0;
};

// The group, operation and place within it that a message belongs to. No key is
// used twice between two workers within an epoch.
struct MessageKey {
  uint64_t group = 0;
  uint64_t sequence = 0;
  uint64_t tag = 0;
  auto operator<=>(const MessageKey&) const = default;
};

// In host byte order: a job is of one architecture.
struct FrameHeader {
  FrameType type = FrameType::kData;
  uint8_t credited = 0;    // kData: was sent within the eager window
  uint16_t signature = 0;  // fingerprint of the operation, equal on all ranks
  uint32_t payload_bytes = 0;
  int64_t epoch = -1;
  MessageKey key;
  uint64_t total = 0;  // bytes of the whole message
};
static_assert(sizeof(FrameHeader) == 48);

// Why a rank takes no further part in a group.
enum class Closing : uint64_t {
  kAborted,  // nobody can go on with it
  kLeft,     // only those can not who need this rank
};

// Messages of up to this size are sent at once, into the eager window.
constexpr size_t kEagerBytes = 16 * 1024;
// Bytes (each message counts kMessageCost more) that a peer may have sent to us
// which no operation of ours has taken yet.
constexpr uint64_t kWindowBytes = 512 * 1024;
constexpr uint64_t kMessageCost = 128;
// Algorithms cut what they pipeline into messages of this size, and frames
// carry no more. 40 frames of a ring's segment overlap at 10 MB.
constexpr size_t kChunkBytes = 256 * 1024;

// Point-to-point messages have sequence numbers of their own, apart from those
// of collectives.
constexpr uint64_t kPointToPoint = uint64_t{1} << 63;
// Above this bit is the generation of the group: it tells a group from another
// of the same name and ranks that was closed before it, in the same epoch.
constexpr int kGenerationShift = 40;

constexpr uint64_t generationOf(uint64_t sequence) {
  return (sequence & ~kPointToPoint) >> kGenerationShift;
}
// What people count.
constexpr uint64_t numberOf(uint64_t sequence) {
  return sequence & ((uint64_t{1} << kGenerationShift) - 1);
}

}  // namespace mnemosyne::ccl
