// What client and server share: the segment, and the numbers of the commands
// that are written by hand (those of api.def's forwarded functions follow, from
// 256).
//
// Both are of one build and start together, so there is no version to
// negotiate; kProtocolMagic is there to catch a server of another build.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "proxy/command.h"
#include "proxy/ring.h"

namespace mnemosyne::proxy {

// Device memory: the client chooses each address, so that it is the same in
// every server. Both ranges lie where neither programs, nor mmap, nor the
// driver put anything by themselves.
constexpr uint64_t kDeviceBase = 0x600000000000;
constexpr uint64_t kDeviceBytes = uint64_t{1} << 40;
constexpr uint64_t kDeviceGranularity = uint64_t{2} << 20;

// The segment is mapped here on both sides. It is sparse: only pages that were
// touched exist. Behind its head lie the host allocations of CUDA programs.
constexpr uint64_t kSegmentBase = 0x620000000000;
constexpr uint64_t kSegmentBytes = uint64_t{1} << 39;

constexpr size_t kRingBytes = size_t{4} << 20;
constexpr size_t kNumReplies = 128;
constexpr size_t kMaxEvents = size_t{1} << 17;
constexpr size_t kNumStagingChunks = 8;
constexpr size_t kStagingChunkBytes = size_t{4} << 20;
constexpr size_t kMaxInlineBytes = 16 * 1024;  // a larger copy is staged

enum class ReplyState : uint32_t { kPending, kAwaited, kDone, kLost };

// The answer to one call that waits.
struct Reply {
  std::atomic<uint32_t> state;  // ReplyState; the futex
  int32_t result;
  uint32_t size_bytes;
  std::byte data[4084];
};
static_assert(sizeof(Reply) == 4096);

struct SegmentHead {
  // Written by a server just before it ends itself: the error of its device.
  std::atomic<int32_t> fault;
  // The first error of a command that nobody waited for; taken by the client.
  std::atomic<int32_t> late_error;
  // An ncclResult_t that no error of the device explains. Set by the server.
  std::atomic<int32_t> comm_error;
  RingControl ring;
  alignas(4096) Reply replies[kNumReplies];
  // Times that an event was reached, in the count of its records. Written by
  // the device in stream order.
  alignas(4096) std::atomic<uint64_t> events_reached[kMaxEvents];
  alignas(4096) std::atomic<uint64_t> chunks_done[kNumStagingChunks];
  alignas(4096) std::byte ring_data[kRingBytes];
  alignas(4096) std::byte staging[kNumStagingChunks][kStagingChunkBytes];
};
constexpr uint64_t kHostBase =
    kSegmentBase + ((sizeof(SegmentHead) + kDeviceGranularity - 1) &
                    ~(kDeviceGranularity - 1));
constexpr uint64_t kHostEnd = kSegmentBase + kSegmentBytes;

// Arguments stand beside each number, in order; "=" means that the call waits.
enum Opcode : uint16_t {
  kAttach = 1,          // DeviceUuid = AttachReply
  kNumberDevices,       // DeviceUuid[]: of the devices 0, 1 ... of the client
  kDeviceProperties,    // device = kDevicePropertiesBytes
  kDeviceAttribute,     // attribute, device = int
  kDevicePciBusId,      // device = text
  kDeviceUuid,          // device = 16 bytes
  kMapMemory,           // address, size, whether its contents were lost =
  kUnmapMemory,         // address, size
  kMapHost,             // address, size =
  kUnmapHost,           // address
  kMemoryInfo,          // = free, total
  kCopyInline,          // stream, destination, bytes
  kCopyFromChunk,       // stream, destination, chunk, size, count of the chunk
  kCopyToChunk,         // stream, source, chunk, size =
  kCopy,                // stream, destination, source, size
  kFill,                // stream, address, pattern, width of the pattern, count
  kCreateStream,        // stream, flags, priority
  kDestroyStream,       // stream
  kSyncStream,          // stream =
  kQueryStream,         // stream =
  kSyncDevice,          // =
  kCreateEvent,         // event, flags
  kDestroyEvent,        // event
  kRecordEvent,         // event, stream, count
  kWaitEvent,           // stream, event
  kQueryEvent,          // event =
  kSyncEvent,           // event =
  kElapsedTime,         // event, event = float
  kLoadLibrary,         // library, address of the bytes =
  kLoadKernel,          // kernel, library, name
  kSetKernelAttribute,  // kernel, attribute, value
  kKernelAttributes,    // kernel = FunctionAttributes
  kOccupancy,           // kernel, block, shared memory, flags = int
  kKernelParameters,    // kernel = KernelParameter[]
  kGlobalAddress,       // library, name = address, size
  kLaunch,          // kernel, stream, grid, block, shared, attributes, bytes
  kDestroyCublas,   // handle
  kLtVersion,       // = size_t
  kLtHeuristic,     // = LtHeuristicResult[]
  kLtMatmul,        //
  kNcclVersion,     // = int
  kNcclUniqueId,    // = NcclUniqueId
  kNcclInit,        // comm, ranks, NcclUniqueId, rank =
  kNcclDestroy,     // comm =
  kNcclGroupStart,  //
  kNcclGroupEnd,    //
  kNcclErrors,      // = what is wrong with any communicator
};

// The number of a device is the client's, and stays: that of a server changes
// when a device is gone, or another takes its place.
using DeviceUuid = std::array<std::byte, 16>;
constexpr size_t kMaxDevices = 64;

struct AttachReply {
  uint64_t device_base;
  uint64_t total_bytes;
  int32_t compute_capability;  // 90 for 9.0
  int32_t least_stream_priority;
  int32_t greatest_stream_priority;
};

// The first thing a server hears on its control socket, and waits for: that it
// shall begin. The text is the client's environment as it is by then, of the
// variables below, each with a 0 behind it; those that are not there are unset.
inline bool isOurVariable(std::string_view text) {
  return text.starts_with("MNEMOSYNE_") &&
         !text.starts_with("MNEMOSYNE_PROXY_GENERATION=");
}

// What a server answers.
struct Hello {
  uint64_t magic;
  int32_t error;  // of the device's start; the rest is valid if it is 0
  int32_t num_devices;
  int32_t driver_version;
  char message[240];
  DeviceUuid uuids[kMaxDevices];
};
constexpr uint64_t kProtocolMagic = 0x6d6e656d6f707831;

// What the client may say there while the ring stands still.
enum class Control : uint32_t { kAbortComm = 1 };
struct ControlMessage {
  Control what;
  uint32_t id;
};

// Where a server finds what it inherits.
constexpr int kControlFd = 3;
constexpr int kSegmentFd = 4;

}  // namespace mnemosyne::proxy
