// docs/design.md, "Fence" and "Failures latch".
#include <poll.h>

#include <atomic>
#include <random>
#include <thread>

#include "common/error.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

void forBothTransports(const std::function<void(bool)>& body) {
  body(true);
  body(false);
}

bool isReadable(int fd) {
  pollfd entry{fd, POLLIN, 0};
  return ::poll(&entry, 1, 0) == 1;
}

// Waits for something that another thread brings about.
void waitUntil(const std::function<bool()>& holds) {
  const Deadline deadline = Deadline::in(Milliseconds(20'000));
  while (!holds()) {
    EXPECT(!deadline.expired());
    std::this_thread::yield();
  }
}

}  // namespace

TEST(a_half_sent_message_is_dropped_without_closing_the_link) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    world.checkAllReduce(groups, 10);
    std::mt19937 random(1);
    for (int round = 0; round < 60; ++round) {
      const size_t count = random() % 500'000;
      auto mine = world.allReduce(groups[0], count);
      auto theirs = world.allReduce(groups[1], count);
      const int64_t before = world.meshes[0]->counters()["bytes_received"];
      const int64_t wanted = random() % (count * 4 + 1) / 2;
      waitUntil([&] {
        return mine->isDone() ||
               world.meshes[0]->counters()["bytes_received"] - before >= wanted;
      });
      ++world.epoch;
      const int first = static_cast<int>(random() % 2);
      EXPECT_EQ(world.seat(first), 0);
      EXPECT_EQ(world.seat(1 - first), 0);
      EXPECT(mine->isDone() && theirs->isDone());
      for (auto& mesh : world.meshes) EXPECT(mesh->failure() == nullptr);
      world.checkAllReduce(groups, 1 + random() % 100'000);
    }
    for (auto& mesh : world.meshes)
      EXPECT_EQ(mesh->counters()["links_opened"], 1);
  });
}

TEST(a_marker_of_a_newer_epoch_cancels_what_is_in_flight) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    world.checkAllReduce(groups, 10);
    auto op = world.allReduce(groups[0], 1000);
    ++world.epoch;
    world.seat(1);
    EXPECT(endsWith<StaleEpoch>(op));
    EXPECT(isReadable(world.meshes[0]->failureFd()));
    EXPECT(endsWith<StaleEpoch>(world.barrier(groups[0])));
    // What the one that is ahead sends meanwhile is not lost.
    auto early = world.allReduce(groups[1], 1000);
    auto early_long = world.allReduce(groups[1], 1'000'000);
    world.seat(0);
    EXPECT(!isReadable(world.meshes[0]->failureFd()));
    world.allReduce(groups[0], 1000)->wait();
    world.allReduce(groups[0], 1'000'000)->wait();
    early->wait();
    early_long->wait();
  });
}

TEST(one_of_several_epochs_can_be_missed) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    world.checkAllReduce(groups, 10);
    for (int round = 0; round < 5; ++round) {
      ++world.epoch;
      world.seat(1);
      auto lost = world.allReduce(groups[1], 400'000);
    }
    world.seat();
    world.checkAllReduce(groups, 100'000);
    EXPECT_THROWS(StaleEpoch, world.seat(0));
  });
}

TEST(the_link_of_a_replaced_worker_is_replaced_and_no_other) {
  forBothTransports([](bool use_shm) {
    World world(3, use_shm);
    auto groups = world.groups();
    std::vector<TestOperation::Ptr> ops;
    world.checkAllReduce(groups, 100'000);
    for (int rank : {0, 2})  // the ring has no link between these two
      ops.push_back(rank == 0 ? world.send(groups[0], 2, 0, {1})
                              : world.recv(groups[2], 0, 0, 1));
    for (auto& op : ops) op->wait();
    for (int round = 0; round < 5; ++round) {
      world.replace(1);
      const auto replaced = world.seat();
      EXPECT_EQ(replaced[0], 1);
      EXPECT_EQ(replaced[1], 0);
      EXPECT_EQ(replaced[2], 1);
      groups[1] = world.group(1);
      world.checkAllReduce(groups, 100'000);
    }
    EXPECT_EQ(world.meshes[0]->counters()["links_open"], 2);
    EXPECT_EQ(world.meshes[0]->counters()["links_replaced"], 5);
  });
}

// It left without a word, and is back at once: nobody may have looked at the
// old link's end when the next operation wants to send over it.
TEST(a_member_that_was_left_out_of_an_epoch_is_dialled_anew) {
  for (bool use_shm : {true, false}) {
    World world(2, use_shm);
    for (int round = 0; round < 300; ++round) {
      auto before = world.groups();
      world.checkAllReduce(before, 10);
      world.meshes[0]->reconfigure(++world.epoch, 0, {world.members[0]});
      ++world.epoch;
      auto after = world.groups();
      world.seat(1);
      auto sent = world.send(after[1], 0, 0, {1});
      world.seat(0);
      world.recv(after[0], 1, 0, 1)->wait();
      sent->wait();
    }
  }
}

TEST(a_fence_from_outside_cancels_all_until_the_next_epoch) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    auto op = world.allReduce(groups[0], 1000);
    auto other = world.barrier(groups[0]);
    world.meshes[0]->fence("because", 1);
    EXPECT(endsWith<PeerLost>(op));
    EXPECT(endsWith<PeerLost>(other));
    EXPECT(endsWith<PeerLost>(world.barrier(groups[0])));
    world.seat();
    world.checkAllReduce(groups, 1000);
  });
}

// Every operation ends, whatever other threads do to the meshes meanwhile.
TEST(fences_epochs_and_operations_may_come_from_any_thread) {
  forBothTransports([](bool use_shm) {
    World world(3, use_shm);
    std::atomic<bool> stop{false};
    std::atomic<int> ended{0};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 3; ++rank) {
      for (int n = 0; n < 2; ++n) {
        threads.emplace_back([&, rank, n] {
          std::mt19937 random(rank * 2 + n);
          auto group = world.group(rank, "group " + std::to_string(n));
          while (!stop) {
            std::vector<TestOperation::Ptr> ops;
            for (int i = 0; i < 3; ++i)
              ops.push_back(world.allReduce(group, random() % 50'000));
            for (auto& op : ops) {
              try {
                op->wait();
              } catch (const Error&) {
              }
              ++ended;
            }
          }
        });
      }
    }
    std::mt19937 random(9);
    for (int round = 0; round < 100; ++round) {
      Mesh& mesh = *world.meshes[random() % 3];
      if (random() % 3 == 0)
        mesh.fence("chaos", static_cast<int>(random() % 3));
      if (random() % 3 == 0) mesh.absorb(random() % 2 == 0);
      if (random() % 3 == 0) mesh.startRecording();
      (void)mesh.failure();
      const int before = ended;
      world.seat();
      waitUntil([&] { return ended > before; });
    }
    stop = true;
    // Operations that wait for a rank whose thread has ended already.
    for (auto& mesh : world.meshes) mesh->fence("the end", -1);
    for (auto& thread : threads) thread.join();
    world.seat();
    auto groups = world.groups();
    world.checkAllReduce(groups, 100'000);
  });
}

TEST(a_timeout_names_who_was_waited_for) {
  World world(3, true);
  auto groups = world.groups();
  auto op = TestOperation::make(Kind::kMonitoredBarrier, groups[0]);
  op->timeout = Milliseconds(100);
  world.start(op);
  auto one = TestOperation::make(Kind::kMonitoredBarrier, groups[1]);
  world.start(one);
  try {
    op->wait();
    EXPECT(false);
  } catch (const CollectiveTimeout& error) {
    EXPECT(std::string(error.what()).find("ranks [2]") != std::string::npos);
    EXPECT_EQ(error.rank(), 2);
  }
}

TEST(absorbed_operations_end_well_with_their_outputs_zeroed) {
  World world(2, true);
  auto groups = world.groups();
  world.meshes[0]->absorb(true);
  auto in_place = world.allReduce(groups[0], 1000);
  auto pure = world.recv(groups[0], 1, 0, 1000);
  pure->data[0].assign(1000, -1);
  world.meshes[0]->fence("because", 1);
  in_place->wait();
  pure->wait();
  EXPECT_EQ(in_place->data[0][0], 1);
  EXPECT_EQ(pure->data[0][999], 0);
  auto control = TestOperation::make(
      Kind::kBarrier, std::make_shared<Group>("control", std::vector<int>{0, 1},
                                              0, Milliseconds(1000), false));
  world.start(control);
  EXPECT(endsWith<PeerLost>(control));
  EXPECT(world.meshes[0]->failure() != nullptr);
  world.meshes[0]->absorb(false);
  EXPECT(endsWith<PeerLost>(world.barrier(groups[0])));
}

TEST(a_mismatch_is_seen_by_both_sides) {
  forBothTransports([](bool use_shm) {
    for (const auto& [one, other] : std::vector<std::pair<size_t, size_t>>{
             {10, 11}, {10, 100'000}, {100'000, 100'001}}) {
      World world(2, use_shm);
      auto groups = world.groups();
      auto mine = world.allReduce(groups[0], one);
      auto theirs = world.allReduce(groups[1], other);
      EXPECT(endsWith<CollectiveMismatch>(mine));
      EXPECT(endsWith<CollectiveMismatch>(theirs));
      world.seat();
      world.checkAllReduce(groups, 1000);
    }
  });
}

}  // namespace mnemosyne::testing
