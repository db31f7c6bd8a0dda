// Workers that are stopped, and go on later: SIGSTOP is what a debugger, a
// container's freezer or an exhausted machine does to them.
#include "forked_world.h"
#include "test.h"

namespace mnemosyne::testing {
TEST(a_stopped_worker_is_named_and_goes_on_in_the_next_epoch) {
  for (bool use_shm : {true, false}) {
    ForkedWorld world(3, use_shm);
    world.seat();
    world.all({.verb = Verb::kConnect});
    world.workers[2].stop();
    for (int rank : {0, 1}) {
      world.workers[rank].tell(
          {.verb = Verb::kReceive, .peer = 2, .timeout_ms = 200});
      const Answer answer = world.workers[rank].answer();
      EXPECT(answer.outcome == Outcome::kTimeout);
      EXPECT_EQ(answer.rank, 2);
    }
    world.workers[2].resume();
    for (const Answer& answer : world.seat()) EXPECT_EQ(answer.value, 0);
    world.all({.verb = Verb::kAllReduce, .count = 100'000});
    world.end();
  }
}

}  // namespace mnemosyne::testing
