// Groups that end one by one while the others on the same mesh go on.
#include <random>

#include "world.h"

namespace mnemosyne::testing {
namespace {

constexpr int kSize = 3;
constexpr size_t kLong = 1'000'000;

void adopt(World& world, std::vector<std::shared_ptr<Group>>& groups) {
  for (auto& group : groups) world.meshes[group->rank()]->adopt(*group);
}

std::vector<std::shared_ptr<Group>> make(World& world,
                                         const std::string& name) {
  auto groups = world.groups(name);
  adopt(world, groups);
  return groups;
}

void abortedGroupEndsAlone(bool use_shm) {
  World world(kSize, use_shm);
  auto doomed = make(world, "doomed");
  auto other = make(world, "other");
  world.checkAllReduce(doomed, 10);
  world.checkAllReduce(other, 10);
  for (size_t count : {size_t{10}, kLong}) {
    auto first = world.allReduce(doomed[0], count);
    auto second = world.allReduce(doomed[1], count);
    auto unhurt = world.allReduce(other[0], count);
    world.meshes[0]->abort(*doomed[0]);
    EXPECT(first->isDone());  // abort() returns when all has ended
    EXPECT(endsWith<GroupAborted>(first));
    EXPECT(endsWith<GroupAborted>(second));
    // It has not begun there, and is told all the same.
    EXPECT(endsWith<GroupAborted>(world.allReduce(doomed[2], count)));
    for (int rank = 0; rank < kSize; ++rank) {
      EXPECT(world.meshes[rank]->failure() == nullptr);
      EXPECT(world.meshes[rank]->failureOf(*doomed[rank]) != nullptr);
      EXPECT(world.meshes[rank]->failureOf(*other[rank]) == nullptr);
    }
    auto rest1 = world.allReduce(other[1], count);
    auto rest2 = world.allReduce(other[2], count);
    unhurt->wait();
    rest1->wait();
    rest2->wait();
    EXPECT_EQ(unhurt->data[0][count - 1], 6);
    // Its name can be used again at once, and nothing old is taken for new.
    doomed = make(world, "doomed");
    for (int i = 0; i < 3; ++i) world.checkAllReduce(doomed, count);
  }
}

TEST(an_aborted_group_ends_alone_over_shm) { abortedGroupEndsAlone(true); }
TEST(an_aborted_group_ends_alone_over_tcp) { abortedGroupEndsAlone(false); }

TEST(what_was_aborted_stays_so_in_the_next_epoch) {
  World world(kSize, true);
  auto groups = make(world, "world");
  auto other = make(world, "other");
  world.checkAllReduce(groups, 100);
  world.meshes[1]->abort(*groups[1]);
  EXPECT(endsWith<GroupAborted>(world.allReduce(groups[0], 100)));
  world.seat();
  for (auto& group : groups)
    EXPECT(endsWith<GroupAborted>(world.allReduce(group, 100)));
  // One rank has given it up already, the others do it now.
  for (int rank : {0, 2}) world.meshes[rank]->leave(*groups[rank]);
  groups = make(world, "world");
  world.checkAllReduce(groups, 100);
  // Generations start again with the epoch, and a newcomer knows of none.
  world.replace(2);
  world.seat();
  groups[2] = world.group(2, "world");
  world.meshes[2]->adopt(*groups[2]);
  other[2] = world.group(2, "other");
  world.checkAllReduce(groups, 100);
  world.checkAllReduce(other, 100);
}

TEST(aborts_amid_traffic_leave_the_right_results) {
  for (bool use_shm : {true, false}) {
    World world(kSize, use_shm);
    auto steady = make(world, "steady");
    std::mt19937 random(7);
    for (int round = 0; round < 60; ++round) {
      auto doomed = make(world, "doomed");
      std::vector<TestOperation::Ptr> ops;
      const size_t count = round % 3 == 0 ? 100'000 : 2'000;
      for (int n = 0; n < 4; ++n) {
        for (auto& group : doomed) ops.push_back(world.allReduce(group, count));
      }
      std::vector<TestOperation::Ptr> kept;
      for (auto& group : steady) kept.push_back(world.allReduce(group, count));
      const int who = static_cast<int>(random() % kSize);
      if (round % 2 == 0) ops[random() % ops.size()]->isDone();
      world.meshes[who]->abort(*doomed[who]);
      for (auto& op : ops) {
        bool is_right = true;
        try {
          op->wait();
          for (int value : op->data[0]) is_right &= value == 6;
        } catch (const GroupAborted&) {
        }
        EXPECT(is_right);
      }
      for (auto& op : kept) {
        op->wait();
        for (int value : op->data[0]) EXPECT_EQ(value, 6);
      }
      // All must know before they make it anew.
      for (auto& group : doomed)
        EXPECT(endsWith<GroupAborted>(world.barrier(group)));
    }
    world.checkAllReduce(steady, kLong);
  }
}

TEST(who_leaves_a_group_is_missed_by_those_who_need_it) {
  World world(kSize, true);
  auto groups = make(world, "world");
  auto other = make(world, "other");
  world.checkAllReduce(groups, 10);
  // What is in flight goes on.
  auto sent = world.send(groups[0], 2, 6, std::vector<int>(100'000, 9));
  world.meshes[0]->leave(*groups[0]);
  EXPECT(endsWith<GroupAborted>(world.barrier(groups[0])));
  auto wanted = world.recv(groups[2], 0, 6, 100'000);
  wanted->wait();
  sent->wait();
  EXPECT_EQ(wanted->data[0][99'999], 9);
  // This one will never come.
  EXPECT(endsWith<PeerLost>(world.recv(groups[1], 0, 5, 4)));
  // Rank 2 sees it by itself, or is told by rank 1, which has given up.
  EXPECT(endsWith<mnemosyne::Error>(world.barrier(groups[2])));
  world.checkAllReduce(other, 10);
  // The same name again: all leave, all make it anew.
  for (int rank = 1; rank < kSize; ++rank)
    world.meshes[rank]->leave(*groups[rank]);
  groups = make(world, "world");
  world.checkAllReduce(groups, 1000);
}

TEST(who_does_not_need_the_one_that_left_goes_on) {
  World world(kSize, false);
  auto groups = make(world, "world");
  world.checkAllReduce(groups, 10);
  world.meshes[2]->leave(*groups[2]);
  for (int n = 0; n < 50; ++n) {
    auto in = world.recv(groups[1], 0, 0, 3);
    auto out = world.send(groups[0], 1, 0, {n, n, n});
    in->wait();
    out->wait();
    EXPECT_EQ(in->data[0][2], n);
  }
  EXPECT(endsWith<mnemosyne::Error>(world.barrier(groups[0])));
}

// Ranks change hands, or mean other workers: only the first is the group's
// business as before.
TEST(a_group_knows_when_its_ranks_mean_other_workers) {
  World world(4, true);
  auto all = make(world, "all");
  std::vector<std::shared_ptr<Group>> pair;
  for (int rank : {0, 1}) {
    pair.push_back(std::make_shared<Group>("pair", std::vector<int>{0, 1}, rank,
                                           Milliseconds(20'000), true));
  }
  adopt(world, pair);
  world.checkAllReduce(all, 10);
  world.replace(3);
  world.seat();
  all[3] = world.group(3, "all");
  world.meshes[3]->adopt(*all[3]);
  world.checkAllReduce(all, 10);

  // Rank 2 goes; rank 3 is rank 2 now. The pair is what it was.
  world.members.erase(world.members.begin() + 2);
  world.meshes.erase(world.meshes.begin() + 2);
  world.seat();
  for (int rank : {0, 1, 3})
    EXPECT(endsWith<StaleEpoch>([&] {
      auto op = TestOperation::make(Kind::kBarrier, all[rank]);
      op->submit(*world.meshes[rank == 3 ? 2 : rank], op);
      return op;
    }()));
  auto first = world.allReduce(pair[0], 5);
  world.allReduce(pair[1], 5)->wait();
  first->wait();
  EXPECT_EQ(first->data[0][0], 3);

  // The two change places.
  std::swap(world.members[0], world.members[1]);
  std::swap(world.meshes[0], world.meshes[1]);
  world.seat();
  for (int rank : {0, 1}) {
    auto op = TestOperation::make(Kind::kBarrier, pair[rank]);
    op->submit(*world.meshes[1 - rank], op);
    EXPECT(endsWith<StaleEpoch>(op));
  }
  bool is_refused = false;
  Group beyond("beyond", {0, 5}, 0, Milliseconds(1000), true);
  try {
    world.meshes[0]->adopt(beyond);
  } catch (const ConfigError&) {
    is_refused = true;
  }
  EXPECT(is_refused);
}

TEST(survivors_move_on_without_the_dead_and_without_being_told) {
  for (bool use_shm : {true, false}) {
    World world(kSize, use_shm);
    auto all = make(world, "all");
    world.checkAllReduce(all, 10);
    auto waits = world.barrier(all[0]);
    world.meshes[2].reset();  // says farewell
    world.meshes[0]->excuse({3});
    world.meshes[1]->excuse({3});
    EXPECT(endsWith<PeerLost>(waits));
    EXPECT(world.meshes[0]->advance());
    EXPECT(!world.meshes[0]->advance());
    std::vector<std::shared_ptr<Group>> pair;
    for (int rank : {0, 1}) {
      pair.push_back(std::make_shared<Group>("pair", std::vector<int>{0, 1},
                                             rank, Milliseconds(20'000), true));
    }
    adopt(world, pair);
    auto first = world.allReduce(pair[0], 5);
    // Rank 1 learns of the epoch from rank 0's marker, and follows.
    auto second = world.allReduce(pair[1], 5);
    if (endsWith<StaleEpoch>(second)) {
      EXPECT(world.meshes[1]->advance());
      second = world.allReduce(pair[1], 5);
    }
    second->wait();
    first->wait();
    EXPECT_EQ(second->data[0][0], 3);
    world.meshes[1]->lockMembership();
    world.meshes[1]->fence("test", -1);
    EXPECT(!world.meshes[1]->advance());
  }
}

}  // namespace
}  // namespace mnemosyne::testing
