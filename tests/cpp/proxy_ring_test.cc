// The ring: order and content over wraps, commands of every size, and either
// side ended at any time without the other standing still.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "proxy/command.h"
#include "proxy/ring.h"
#include "test.h"

using namespace mnemosyne::proxy;

namespace {

constexpr size_t kBytes = 256 * 1024;

// Control and bytes in memory that processes share.
class Shared {
 public:
  Shared()
      : at_(mmap(nullptr, kSize, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0)) {}
  ~Shared() { munmap(at_, kSize); }
  RingControl* control() { return static_cast<RingControl*>(at_); }
  std::byte* data() { return static_cast<std::byte*>(at_) + 4096; }
  WaitClock since{0};  // of the writer

 private:
  static constexpr size_t kSize = 4096 + kBytes;
  void* at_;
};

// Record `index` as both sides know it: its size and its bytes.
std::vector<std::byte> payloadOf(uint64_t index, size_t max_bytes) {
  std::mt19937_64 random(index);
  std::vector<std::byte> bytes(index % 7 == 0 ? max_bytes : random() % 700);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

void writeRecords(Shared& shared, uint64_t count) {
  RingWriter writer(shared.control(), shared.data(), kBytes, &shared.since);
  for (uint64_t index = 0; index < count; ++index) {
    if (!writer.put(index & 0xfff, kNoReply,
                    payloadOf(index, kMaxPayloadBytes)))
      return;
  }
}

// How many records came, each as it was written.
uint64_t readRecords(Shared& shared, uint64_t count) {
  RingReader reader(shared.control(), shared.data(), kBytes);
  uint64_t index = 0;
  for (; index < count; ++index) {
    const auto record = reader.next();
    if (!record) break;
    const auto want = payloadOf(index, kMaxPayloadBytes);
    EXPECT(record->index == index);
    EXPECT(record->opcode == (index & 0xfff));
    EXPECT(std::ranges::equal(record->payload, want));
    reader.release();
  }
  return index;
}

}  // namespace

TEST(records_arrive_in_order_and_whole_over_many_wraps) {
  Shared shared;
  constexpr uint64_t kRecords = 4000;
  std::thread writer([&] { writeRecords(shared, kRecords); });
  EXPECT(readRecords(shared, kRecords) == kRecords);
  writer.join();
}

TEST(a_writer_without_room_waits_for_the_reader) {
  Shared shared;
  std::thread writer([&] { writeRecords(shared, 200); });
  // Far more than the ring holds, so the writer sleeps until the first release.
  while (shared.control()->writer_sleeps.load() == 0) std::this_thread::yield();
  EXPECT(shared.since.load() != 0);
  EXPECT(readRecords(shared, 200) == 200);
  writer.join();
  EXPECT(shared.since.load() == 0);
}

TEST(a_writer_with_room_never_reads_the_clock) {
  Shared shared;
  shared.since = -1;
  writeRecords(shared, 3);
  EXPECT(shared.since.load() == -1);
}

TEST(closing_wakes_both_sides) {
  Shared shared;
  std::thread reader([&] { EXPECT(readRecords(shared, 1) == 0); });
  while (shared.control()->reader_sleeps.load() == 0) std::this_thread::yield();
  shared.control()->close();
  reader.join();

  Shared full;
  std::thread writer([&] { writeRecords(full, 1000); });
  while (full.control()->writer_sleeps.load() == 0) std::this_thread::yield();
  full.control()->close();
  writer.join();
}

// What a reader leaves behind that is killed between its two steps of a wake.
TEST(closing_wakes_a_side_whose_peer_died_while_waking_it) {
  for (int round = 0; round < 200; ++round) {
    Shared full;
    std::thread writer([&] { writeRecords(full, 1000); });
    auto& sleeps = full.control()->writer_sleeps;
    while (sleeps.load() == 0) std::this_thread::yield();
    sleeps.store(0);
    full.control()->close();
    writer.join();
  }
}

TEST(a_record_with_an_impossible_size_is_refused) {
  for (const uint32_t size :
       {8u, 17u, static_cast<uint32_t>(kBytes) + 16, 4096u}) {
    Shared shared;
    RingWriter writer(shared.control(), shared.data(), kBytes, &shared.since);
    EXPECT(writer.put(1, kNoReply, {}));
    std::memcpy(shared.data(), &size, sizeof size);
    RingReader reader(shared.control(), shared.data(), kBytes);
    bool is_refused = false;
    try {
      reader.next();
    } catch (const ProtocolError&) {
      is_refused = true;
    }
    EXPECT(is_refused);
  }
}

// The dead side cannot close the ring: whoever sees the process end does it.
TEST(either_side_may_be_killed_at_any_time) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 60; ++round) {
    Shared shared;
    const bool kills_reader = round % 2 == 0;
    const pid_t child = fork();
    if (child == 0) {
      kills_reader ? static_cast<void>(readRecords(shared, UINT64_MAX))
                   : writeRecords(shared, UINT64_MAX);
      _exit(0);
    }
    const uint64_t until = random() % 3000;
    std::thread killer([&] {
      auto& moved =
          kills_reader ? shared.control()->read : shared.control()->written;
      while (moved.load() < until * 64) std::this_thread::yield();
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
      shared.control()->close();
    });
    if (kills_reader) {
      writeRecords(shared, UINT64_MAX);
    } else {
      readRecords(shared, UINT64_MAX);
    }
    killer.join();
  }
}
