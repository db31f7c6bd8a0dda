// Repair after repair in the same processes. Results are right after each, and
// nothing grows. MNEMOSYNE_SOAK_ROUNDS: how many repairs.
#include <signal.h>

#include <cstdlib>
#include <iostream>
#include <random>
#include <set>

#include "forked_world.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

// Sanitizers keep freed memory for a while, but know what is in use to the
// byte; malloc counts its caches as in use.
#if defined(__SANITIZE_THREAD__)
constexpr int kRounds = 60;
constexpr bool kMeasuresMemory = false;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int kRounds = 200;
constexpr bool kMeasuresMemory = false;
#else
constexpr int kRounds = 1000;
constexpr bool kMeasuresMemory = true;
#endif
constexpr int kRanks = 8;
// Never a victim, so it lives through all epochs.
constexpr int kWitness = 3;
// The heap's high-water mark moves by 1 MiB with what is in flight at a death.
constexpr int64_t kAllowedGrowth = 4 << 20;
// What is allocated moves by what containers keep.
constexpr int64_t kAllowedHeapGrowth = 64 << 10;

Usage usageOf(ForkedWorker& worker) {
  worker.tell({.verb = Verb::kMeasure});
  return worker.answer().usage;
}

class Soak {
 public:
  Soak(bool use_shm, unsigned seed) : world_(kRanks, use_shm), random_(seed) {
    world_.seat();
    check();
  }

  // Somebody dies while all of them work, or while they move to a new epoch.
  void round() {
    const std::set<int> victims = chooseVictims();
    const bool while_moving = random_() % 4 == 0;
    const Request work = {.verb = Verb::kAllReduce,
                          .groups = static_cast<int>(1 + random_() % 4),
                          .count = 1 + random_() % 50'000};
    if (while_moving) {
      ++world_.epoch;
      for (int rank = 0; rank < kRanks; ++rank) world_.tellSeat(rank);
    } else {
      world_.tellAll(work);
    }
    for (int rank : victims) world_.workers[rank].kill();
    for (int rank : victims) world_.replace(rank);
    // Who waits for one that is not dead is told by the others' new epoch.
    ++world_.epoch;
    for (int rank = 0; rank < kRanks; ++rank) world_.tellSeat(rank);
    for (int rank = 0; rank < kRanks; ++rank)
      if (victims.count(rank) == 0) checkSurvivor(rank, victims);
    for (ForkedWorker& worker : world_.workers)
      EXPECT(worker.answer().outcome == Outcome::kDone);
    check();
  }

  // All links of each are open, and no other.
  Usage witness() {
    world_.all({.verb = Verb::kConnect});
    return usageOf(world_.workers[kWitness]);
  }

  void end() { world_.end(); }

 private:
  std::set<int> chooseVictims() {
    std::set<int> victims;
    const int count = static_cast<int>(random_() % 3);  // none: a new epoch
    while (static_cast<int>(victims.size()) < count) {
      const int rank = static_cast<int>(random_() % kRanks);
      if (rank != kWitness) victims.insert(rank);
    }
    return victims;
  }

  // It has the right result, or an error that names the dead, or was told of
  // the new epoch before.
  void checkSurvivor(int rank, const std::set<int>& victims) {
    const Answer answer = world_.workers[rank].answer();
    if (answer.outcome == Outcome::kDone) return;
    if (answer.outcome == Outcome::kStale) return;
    if (answer.outcome == Outcome::kPeerLost && victims.count(answer.rank) > 0)
      return;
    throw std::runtime_error(answer.text);
  }

  void check() {
    world_.all({.verb = Verb::kAllReduce,
                .groups = static_cast<int>(1 + random_() % 4),
                .count = 1 + random_() % 2000});
  }

  ForkedWorld world_;
  std::mt19937 random_;
};

void soak(bool use_shm) {
  const char* wanted = std::getenv("MNEMOSYNE_SOAK_ROUNDS");
  const int rounds = wanted ? std::atoi(wanted) : kRounds;
  Soak soak(use_shm, 7);
  Usage before{};
  for (int n = 0; n < rounds; ++n) {
    if (n == rounds / 5) before = soak.witness();
    soak.round();
  }
  const Usage after = soak.witness();
  std::cout << "      " << rounds << " repairs; descriptors " << before.fds
            << " -> " << after.fds << ", threads " << before.threads << " -> "
            << after.threads << ", heap " << before.heap_bytes << " -> "
            << after.heap_bytes << " B, private " << before.rss_bytes << " -> "
            << after.rss_bytes << " B" << std::endl;
  EXPECT_EQ(after.links_open, int64_t{kRanks - 1});
  // A connection may be on its way in; a leak would show 800 times.
  EXPECT(after.fds <= before.fds + 1);
  EXPECT_EQ(after.threads, before.threads);
  if (kMeasuresMemory) {
    EXPECT(after.rss_bytes < before.rss_bytes + kAllowedGrowth);
    EXPECT(after.mapped_bytes < before.mapped_bytes + kAllowedGrowth);
  } else {
    EXPECT(after.heap_bytes < before.heap_bytes + kAllowedHeapGrowth);
  }
  soak.end();
}

}  // namespace

TEST(a_thousand_repairs_over_shared_memory_leave_nothing_behind) { soak(true); }

TEST(a_thousand_repairs_over_tcp_leave_nothing_behind) { soak(false); }

TEST(each_of_sixty_four_workers_replaces_one_link_when_one_dies) {
  for (bool use_shm : {true, false}) {
    ForkedWorld world(64, use_shm);
    world.seat();
    world.all({.verb = Verb::kConnect});
    for (int victim : {0, 40}) {
      world.workers[victim].kill();
      world.replace(victim);
      const auto seated = world.seat();
      for (int rank = 0; rank < world.size(); ++rank)
        EXPECT_EQ(seated[rank].value, int64_t{rank != victim});
      world.all({.verb = Verb::kConnect});
      world.all({.verb = Verb::kAllReduce, .groups = 16, .count = 1000});
    }
    // 63 links of the start, and one for each of the two newcomers.
    EXPECT_EQ(usageOf(world.workers[7]).links_opened, int64_t{65});
    world.end();
  }
}

}  // namespace mnemosyne::testing
