// Operations that cannot begin, as when memory is short: each ends with an
// error, none takes those behind it along, and the next epoch is healthy.
#include <functional>
#include <thread>

#include "world.h"

namespace mnemosyne::testing {
namespace {

constexpr auto kNoSuchKind = static_cast<Kind>(99);  // starting it throws

// Runs a function when it ends, while the engine is held.
class Hook final : public Operation {
 public:
  explicit Hook(std::function<void()> action) : action_(std::move(action)) {}

 private:
  void complete(std::exception_ptr, CallbackThreads&) noexcept override {
    action_();
  }
  const std::function<void()> action_;
};

}  // namespace

TEST(an_operation_that_cannot_begin_ends_with_its_error) {
  World world(2, true);
  auto groups = world.groups();
  world.checkAllReduce(groups, 10);

  auto bad = TestOperation::make(kNoSuchKind, groups[0]);
  world.start(bad);

  EXPECT(endsWith<std::logic_error>(bad));
  EXPECT(endsWith<std::logic_error>(world.barrier(groups[0])));
  world.seat();
  world.checkAllReduce(groups, 10);
}

TEST(those_that_were_submitted_behind_it_end_too) {
  World world(2, true);
  auto groups = world.groups();
  world.checkAllReduce(groups, 10);
  auto bad = TestOperation::make(kNoSuchKind, groups[0]);
  auto behind = TestOperation::make(Kind::kBarrier, groups[0]);
  // Another thread submits them while the engine is held: one list.
  bad->is_helping = behind->is_helping = false;  // it may not have done so yet
  Hook hook([&] {
    std::thread([&] {
      world.start(bad);
      world.start(behind);
    }).join();
  });
  hook.kind = Kind::kSend;
  hook.group = groups[0];
  hook.root = 1;
  hook.timeout = Milliseconds(20'000);
  hook.inputs = {Buffer{}};
  auto receive = world.recv(groups[1], 0, 0, 0);

  world.meshes[0]->submit(&hook);

  EXPECT(endsWith<std::logic_error>(bad));
  EXPECT(endsWith<std::logic_error>(behind));
  receive->wait();
  world.seat();
  world.checkAllReduce(groups, 10);
}

TEST(what_has_ended_is_remembered) {
  World world(2, true);
  auto groups = world.groups();
  for (int n = 0; n < 300; ++n) world.checkAllReduce(groups, 10);
  auto bad = TestOperation::make(kNoSuchKind, groups[0]);
  world.start(bad);
  EXPECT(endsWith<std::logic_error>(bad));

  const std::vector<Finished> all = world.meshes[0]->finished();

  EXPECT_EQ(all.size(), size_t{256});
  for (size_t n = 0; n < all.size(); ++n) {
    const bool is_last = n + 1 == all.size();
    EXPECT_EQ(all[n].sequence, 300 - 255 + n);
    EXPECT(all[n].outcome ==
           (is_last ? Outcome::kFailed : Outcome::kCompleted));
    EXPECT_EQ(all[n].error.empty(), !is_last);
    EXPECT_EQ(all[n].num_bytes, is_last ? 0 : 10 * sizeof(int));
    EXPECT(all[n].began <= all[n].ended);
    EXPECT(n == 0 || all[n - 1].ended <= all[n].ended);
  }
}

}  // namespace mnemosyne::testing
