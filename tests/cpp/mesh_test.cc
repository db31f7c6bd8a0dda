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

}  // namespace

TEST(all_ranks_get_the_sum_whatever_the_size) {
  forBothTransports([](bool use_shm) {
    for (int size : {1, 2, 3, 5}) {
      World world(size, use_shm);
      auto groups = world.groups();
      for (size_t count : {0, 1, 1000, 5000, 70'001, 700'000})
        world.checkAllReduce(groups, count);
    }
  });
}

// Two ranks send the whole as one message, more of them in chunks.
TEST(a_broadcast_arrives_whole_from_any_root_whatever_the_size) {
  forBothTransports([](bool use_shm) {
    for (int size : {2, 3}) {
      World world(size, use_shm);
      auto groups = world.groups();
      for (size_t count : {0, 1, 4096, 4097, 65'536, 65'537, 700'001}) {
        for (int root : {0, size - 1}) {
          std::vector<int> values(count);
          std::iota(values.begin(), values.end(), root);
          std::vector<TestOperation::Ptr> ops;
          for (int rank = 0; rank < size; ++rank) {
            auto op = TestOperation::make(Kind::kBroadcast, groups[rank]);
            op->type = DataType::kInt32;
            op->root = root;
            op->outputs = {
                op->own(rank == root ? values : std::vector<int>(count, -1))};
            op->submit(*world.meshes[rank], op);
            ops.push_back(op);
          }
          for (auto& op : ops) {
            op->wait();
            EXPECT(op->data[0] == values);
          }
        }
      }
    }
  });
}

TEST(there_is_one_link_per_pair_even_if_both_dial_at_once) {
  forBothTransports([](bool use_shm) {
    for (int round = 0; round < 10; ++round) {
      World world(4, use_shm);
      auto groups = world.groups();
      std::vector<TestOperation::Ptr> ops;
      for (int rank = 0; rank < 4; ++rank)
        for (int peer = 0; peer < 4; ++peer)
          if (peer != rank) {
            ops.push_back(world.send(groups[rank], peer, 0, {rank}));
            ops.push_back(world.recv(groups[rank], peer, 0, 1));
          }
      for (auto& op : ops) op->wait();
      for (auto& mesh : world.meshes) {
        EXPECT_EQ(mesh->counters()["links_open"], 3);
        EXPECT_EQ(mesh->counters()["failures"], 0);
      }
    }
  });
}

// 40 MB of small messages that nobody receives yet: the window holds 0.5 MB of
// them.
TEST(messages_beyond_the_window_wait_and_arrive_in_order) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    constexpr int kCount = 4000;
    std::vector<TestOperation::Ptr> sends;
    for (int n = 0; n < kCount; ++n)
      sends.push_back(
          world.send(groups[0], 1, 7, std::vector<int>(n % 4000 + 1, n)));
    // Another group is not held up by them.
    auto others = world.groups("other");
    world.checkAllReduce(others, 100'000);
    EXPECT(!sends.back()->isDone());
    EXPECT(world.meshes[1]->counters()["bytes_received"] < 4'000'000);
    for (int n = 0; n < kCount; ++n) {
      auto op = world.recv(groups[1], 0, 7, n % 4000 + 1);
      op->wait();
      EXPECT_EQ(op->data[0].back(), n);
    }
    for (auto& send : sends) send->wait();
  });
}

TEST(two_groups_may_be_used_in_any_order) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto a = world.groups("a");
    auto b = world.groups("b");
    std::vector<TestOperation::Ptr> ops;
    for (int round = 0; round < 20; ++round) {
      const size_t count = round % 2 == 0 ? 10 : 300'000;
      ops.push_back(world.allReduce(a[0], count));
      ops.push_back(world.allReduce(b[0], count));
    }
    for (int round = 0; round < 20; ++round)
      ops.push_back(world.allReduce(b[1], round % 2 == 0 ? 10 : 300'000));
    for (int round = 0; round < 20; ++round)
      ops.push_back(world.allReduce(a[1], round % 2 == 0 ? 10 : 300'000));
    for (auto& op : ops) op->wait();
  });
}

TEST(a_receive_from_any_takes_turns_with_those_from_one) {
  forBothTransports([](bool use_shm) {
    World world(3, use_shm);
    auto groups = world.groups();
    for (size_t count : {1, 100'000}) {
      auto any = world.recv(groups[0], -1, 5, count);
      auto from_two = world.recv(groups[0], 2, 5, count);
      auto other_any = world.recv(groups[0], -1, 5, count);
      auto first = world.send(groups[2], 0, 5, std::vector<int>(count, 1));
      any->wait();
      EXPECT_EQ(any->source_rank, 2);
      auto second = world.send(groups[2], 0, 5, std::vector<int>(count, 2));
      from_two->wait();
      EXPECT_EQ(from_two->data[0].back(), 2);
      auto third = world.send(groups[1], 0, 5, std::vector<int>(count, 3));
      other_any->wait();
      EXPECT_EQ(other_any->source_rank, 1);
      for (auto& op : {first, second, third}) op->wait();
    }
  });
}

TEST(many_threads_may_submit_to_their_groups_at_once) {
  forBothTransports([](bool use_shm) {
    World world(3, use_shm);
    std::vector<std::thread> threads;
    std::atomic<int> failures{0};
    for (int rank = 0; rank < 3; ++rank) {
      for (int group = 0; group < 3; ++group) {
        threads.emplace_back([&, rank, group] {
          try {
            auto own = world.group(rank, "group " + std::to_string(group));
            for (int round = 0; round < 50; ++round)
              world.allReduce(own, 1 + round * 500)->wait();
          } catch (const std::exception&) {
            ++failures;
          }
        });
      }
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(failures.load(), 0);
  });
}

TEST(an_operation_without_a_membership_says_so) {
  Mesh mesh(1, "secret", "127.0.0.1", true);
  auto group = std::make_shared<Group>("g", std::vector<int>{0, 1}, 0,
                                       Milliseconds(1000), true);
  auto op = TestOperation::make(Kind::kBarrier, group);
  op->submit(mesh, op);
  EXPECT(endsWith<StaleEpoch>(op));
  mesh.close();
  auto late = TestOperation::make(Kind::kBarrier, group);
  EXPECT_THROWS(std::runtime_error, late->submit(mesh, late));
}

TEST(a_mesh_can_go_while_operations_are_in_flight) {
  forBothTransports([](bool use_shm) {
    World world(2, use_shm);
    auto groups = world.groups();
    world.checkAllReduce(groups, 10);
    auto op = world.allReduce(groups[0], 1'000'000);
    op->is_helping = false;  // there is nothing left to turn
    world.meshes[0].reset();
    EXPECT(endsWith<StaleEpoch>(op));
    // It has left in good order: only who needs it fails.
    EXPECT(world.meshes[1]->failure() == nullptr);
    EXPECT(endsWith<PeerLost>(world.allReduce(groups[1], 10)));
  });
}

}  // namespace mnemosyne::testing
