// What grows with the number of workers: memory, descriptors, connections, and
// the time of set-up and repair. Prints rows of tables; docs/scale.md has them.
//
//   many_workers [shm|tcp] [ranks ...]
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "forked_world.h"

namespace mnemosyne::testing {
namespace {

constexpr int kRepairs = 7;
constexpr int kMaxGroups = 16;

double msSince(int64_t start_ns) { return (nowNs() - start_ns) / 1e6; }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Of all workers, per worker.
Usage meanUsage(ForkedWorld& world) {
  Usage sum{};
  for (const Answer& answer : world.all({.verb = Verb::kMeasure})) {
    sum.rss_bytes += answer.usage.rss_bytes;
    sum.shared_bytes += answer.usage.shared_bytes;
    sum.mapped_bytes += answer.usage.mapped_bytes;
    sum.fds += answer.usage.fds;
    sum.threads += answer.usage.threads;
    sum.links_open += answer.usage.links_open;
    sum.bytes_sent += answer.usage.bytes_sent;
  }
  for (int64_t* field :
       {&sum.rss_bytes, &sum.shared_bytes, &sum.mapped_bytes, &sum.fds,
        &sum.threads, &sum.links_open, &sum.bytes_sent})
    *field /= world.size();
  return sum;
}

void printUsage(const char* when, double ms, const Usage& usage) {
  std::printf("| %s | %.1f | %lld | %lld | %.0f | %.0f | %.0f |\n", when, ms,
              static_cast<long long>(usage.links_open),
              static_cast<long long>(usage.fds), usage.rss_bytes / 1024.0,
              usage.shared_bytes / 1024.0, usage.mapped_bytes / 1024.0);
}

void timed(ForkedWorld& world, const char* what, const Request& request) {
  const int64_t start = nowNs();
  world.all(request);
  const double ms = msSince(start);
  printUsage(what, ms, meanUsage(world));
}

// Kills one rank and replaces it; adds the time until all links have carried a
// message, and that until all groups have reduced. The newcomer is there before
// the clock starts, as a standby is.
void repair(ForkedWorld& world, int groups, int victim,
            std::vector<double>* linked, std::vector<double>* reduced) {
  world.workers[victim].kill();
  world.replace(victim);
  const int64_t start = nowNs();
  world.seat();
  world.all({.verb = Verb::kConnect});
  linked->push_back(msSince(start));
  world.all({.verb = Verb::kAllReduce, .groups = groups});
  reduced->push_back(msSince(start));
}

void measure(bool use_shm, int ranks) {
  std::printf("\n%d ranks, %s; memory in KiB per worker\n\n", ranks,
              use_shm ? "shared memory" : "TCP");
  std::printf(
      "| after | ms | links | fds | private | shared | mapped |\n"
      "|---|---|---|---|---|---|---|\n");
  int64_t start = nowNs();
  ForkedWorld world(ranks, use_shm);
  printUsage("start", msSince(start), meanUsage(world));
  start = nowNs();
  world.seat();
  const double seated = msSince(start);
  printUsage("first membership", seated, meanUsage(world));
  timed(world, "first barrier", {.verb = Verb::kBarrier});
  timed(world, "all-reduce, 4 B", {.verb = Verb::kAllReduce});
  timed(world, "all-reduce, 1 MiB",
        {.verb = Verb::kAllReduce, .count = 1 << 18});
  timed(world, "all links open", {.verb = Verb::kConnect});
  timed(world, "all-to-all, 4 B", {.verb = Verb::kConnect});
  timed(world, "all-reduce, 4 B", {.verb = Verb::kAllReduce});

  std::printf(
      "\n| groups | links back, ms: min | median | reduced, ms: min | median "
      "|\n|---|---|---|---|---|\n");
  for (int groups : {1, 4, kMaxGroups}) {
    world.all({.verb = Verb::kAllReduce, .groups = groups});
    std::vector<double> linked, reduced;
    for (int n = 0; n < kRepairs; ++n)
      repair(world, groups, (n * 5 + 1) % ranks, &linked, &reduced);
    std::printf("| %d | %.2f | %.2f | %.2f | %.2f |\n", groups,
                *std::min_element(linked.begin(), linked.end()), median(linked),
                *std::min_element(reduced.begin(), reduced.end()),
                median(reduced));
  }
  world.end();
}

// What one worker pays for the number of ranks alone: the others are made up.
void measureMembership(int ranks) {
  ForkedWorker worker(1, true);
  std::vector<ccl::Mesh::Member> members(ranks, worker.member());
  for (int rank = 1; rank < ranks; ++rank)
    members[rank].worker_id = static_cast<uint64_t>(rank + 1);
  std::vector<double> took;
  for (int64_t epoch = 1; epoch <= kRepairs; ++epoch) {
    members[ranks / 2].worker_id += static_cast<uint64_t>(ranks);
    worker.tell({.verb = Verb::kSeat, .rank = 0, .epoch = epoch}, members);
    took.push_back(worker.answer().took_ns / 1e6);
  }
  worker.tell({.verb = Verb::kMeasure});
  std::printf("| %d | %.3f | %.3f | %.0f |\n", ranks,
              *std::min_element(took.begin(), took.end()), median(took),
              worker.answer().usage.rss_bytes / 1024.0);
}

void measureMemberships() {
  std::printf(
      "\n| ranks | new membership, ms: min | median | private, KiB |\n"
      "|---|---|---|---|\n");
  for (int ranks : {4, 64, 1024, 16384}) measureMembership(ranks);
}

}  // namespace
}  // namespace mnemosyne::testing

int main(int argc, char** argv) {
  const std::string transport = argc > 1 ? argv[1] : "shm";
  std::vector<int> sizes;
  for (int i = 2; i < argc; ++i) sizes.push_back(std::atoi(argv[i]));
  if (sizes.empty()) sizes = {4, 16, 64};
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    for (int ranks : sizes)
      mnemosyne::testing::measure(transport == "shm", ranks);
    mnemosyne::testing::measureMemberships();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "many_workers: %s\n", error.what());
    return 1;
  }
  return 0;
}
