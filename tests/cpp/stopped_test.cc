// Workers that are stopped, and go on later: SIGSTOP is what a debugger, a
// container's freezer or an exhausted machine does to them.
#include "forked_world.h"
#include "test.h"

namespace mnemosyne::testing {
namespace {

constexpr uint64_t kOneFrame = 256 * 1024 / sizeof(int);

int64_t bytesReceived(ForkedWorker& worker) {
  worker.tell({.verb = Verb::kMeasure});
  return worker.answer().usage.bytes_received;
}

}  // namespace

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

// The sender gives up within the last frame of a message. Its receiver, which
// has read nothing yet, must not take what fills the frame up for the message.
TEST(half_a_frame_that_was_given_up_is_no_message) {
  for (bool use_shm : {true, false}) {
    ForkedWorld world(2, use_shm);
    world.seat();
    world.all({.verb = Verb::kConnect});
    ForkedWorker& sender = world.workers[0];
    ForkedWorker& receiver = world.workers[1];
    const int64_t before = bytesReceived(sender);
    receiver.tell({.verb = Verb::kReceive, .peer = 0, .count = kOneFrame});
    while (bytesReceived(sender) == before) {  // its grant
    }
    receiver.stop();
    // A ring holds all but the last bytes of the frame.
    sender.tell({.verb = Verb::kSend,
                 .peer = 1,
                 .count = kOneFrame,
                 .timeout_ms = 200});
    const Answer sent = sender.answer();
    EXPECT(sent.outcome == Outcome::kTimeout || !use_shm);
    receiver.resume();
    // It may end now, or wait until it is told of the new epoch.
    (void)receiver.hasAnswered(300);
    ++world.epoch;
    for (int rank : {0, 1}) world.tellSeat(rank);
    const Answer received = receiver.answer();
    if (received.outcome == Outcome::kWrongResult)
      throw std::runtime_error(received.text);
    for (const Answer& answer : world.answers())
      EXPECT(answer.outcome == Outcome::kDone);
    world.all({.verb = Verb::kAllReduce, .count = 100'000});
    world.end();
  }
}

}  // namespace mnemosyne::testing
