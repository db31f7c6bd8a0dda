// A peer that is cut off at any byte of what it says: what had arrived whole is
// right, everything else fails with the name of the peer, at once.
#include <poll.h>

#include <cstring>
#include <set>

#include "common/error.h"
#include "fake_peer.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

constexpr size_t kShort = 25;   // integers, sent at once
constexpr size_t kLong = 5000;  // needs a grant, comes in two frames
constexpr uint64_t kShortTag = 7, kLongTag = 8, kSendTag = 9;

enum class End { kDeath, kReset };

std::vector<int> pattern(size_t count, int64_t epoch) {
  std::vector<int> values(count);
  for (size_t i = 0; i < count; ++i)
    values[i] = static_cast<int>(i * 7 + static_cast<size_t>(epoch));
  return values;
}

// All that rank 1 says in one epoch, and where in it things are complete.
struct Script {
  std::vector<std::byte> bytes;
  size_t short_end = 0, long_end = 0, grant_end = 0;
  std::set<size_t> cuts;  // each byte of what is short, some of the rest

  Script(uint64_t group, int64_t epoch) : group_(group), epoch_(epoch) {
    const auto few = pattern(kShort, epoch);
    const auto many = pattern(kLong, epoch);
    frame(FrameType::kData, kShortTag, kShort, few.data(), kShort, true);
    short_end = bytes.size();
    frame(FrameType::kRequest, kLongTag, kLong);
    const size_t half = kLong / 2 - 3;
    frame(FrameType::kData, kLongTag, kLong, many.data(), half);
    frame(FrameType::kData, kLongTag, kLong, &many[half], kLong - half);
    long_end = bytes.size();
    frame(FrameType::kGrant, kSendTag, kLong);
    grant_end = bytes.size();
    frame(FrameType::kCredit, 0, 64);
    frame(FrameType::kFarewell, 0, 0);
    cuts.insert(bytes.size());
  }

 private:
  void frame(FrameType type, uint64_t tag, size_t total,
             const int* payload = nullptr, size_t count = 0,
             bool credited = false) {
    FrameHeader header;
    header.type = type;
    header.credited = credited;
    header.payload_bytes = static_cast<uint32_t>(count * sizeof(int));
    header.epoch = epoch_;
    header.key = {group_, kPointToPoint, tag};
    header.total = total * sizeof(int);
    const size_t begin = bytes.size();
    append(&header, sizeof(header));
    append(payload, count * sizeof(int));
    constexpr size_t kEdge = sizeof(header) + kShort * sizeof(int);
    for (size_t at = begin; at < bytes.size(); ++at) {
      const bool is_edge = at < begin + kEdge || at + 32 > bytes.size();
      if (is_edge || at % 97 == 0) cuts.insert(at);
    }
  }

  void append(const void* data, size_t size) {
    const auto* from = static_cast<const std::byte*>(data);
    bytes.insert(bytes.end(), from, from + size);
  }

  const uint64_t group_;
  const int64_t epoch_;
};

// How an operation ended: true if well; its failure must be a PeerLost.
bool succeeded(const TestOperation::Ptr& op) {
  try {
    op->wait();
    return true;
  } catch (const PeerLost& error) {
    EXPECT_EQ(error.rank(), 1);
    return false;
  }
}

void cutAtAnyByte(bool use_shm, End end) {
  World world(1, use_shm);
  Mesh& mesh = *world.meshes[0];
  FakePeer peer(1000);
  world.members.push_back(peer.member());
  peer.members = Mesh::digestOf(world.members);
  const std::vector<int> both = {0, 1};
  auto group =
      std::make_shared<Group>("world", both, 0, Milliseconds(20'000), true);
  const std::set<size_t> cuts = Script(group->id(), 0).cuts;
  for (size_t cut : cuts) {
    // The peer is ahead, so that only it dials.
    EXPECT(peer.dial(mesh, world.members[0].worker_id, ++world.epoch,
                     use_shm) == Handshake::State::kLinked);
    world.seat(0);
    auto few = world.recv(group, 1, kShortTag, kShort);
    auto many = world.recv(group, 1, kLongTag, kLong);
    auto sent = world.send(group, 1, kSendTag, pattern(kLong, 0));
    EXPECT(peer.hearFrame(FrameType::kGrant, kLongTag));

    const Script script(group->id(), world.epoch);
    EXPECT(peer.say(script.bytes.data(), cut));
    if (cut >= script.grant_end)
      EXPECT(peer.hearFrame(FrameType::kData, kSendTag));
    peer.hangUp(end == End::kReset);

    const bool few_came = succeeded(few);
    const bool many_came = succeeded(many);
    if (few_came) EXPECT(few->data[0] == pattern(kShort, world.epoch));
    if (many_came) EXPECT(many->data[0] == pattern(kLong, world.epoch));
    // An operation may fail although its last byte has come, never the reverse.
    EXPECT(cut >= script.short_end || !few_came);
    EXPECT(cut >= script.long_end || !many_came);
    EXPECT(cut >= script.grant_end || !succeeded(sent));
    if (cut < script.bytes.size()) {  // it said no farewell
      pollfd entry{mesh.failureFd(), POLLIN, 0};
      EXPECT_EQ(::poll(&entry, 1, 15'000), 1);
    }
  }
  // The last one said farewell: that is no failure.
  if (end == End::kDeath) EXPECT(mesh.failure() == nullptr);
}

}  // namespace

TEST(a_peer_that_dies_at_any_byte_over_shared_memory_is_named) {
  cutAtAnyByte(true, End::kDeath);
}

TEST(a_peer_that_dies_at_any_byte_over_tcp_is_named) {
  cutAtAnyByte(false, End::kDeath);
}

TEST(a_connection_that_is_reset_at_any_byte_is_named) {
  cutAtAnyByte(false, End::kReset);
}

}  // namespace mnemosyne::testing
