#include "ccl/setup_log.h"

#include <stdexcept>

#include "common/error.h"
#include "world.h"

namespace mnemosyne::testing {
namespace {

std::shared_ptr<Group> group(const std::string& name) {
  return std::make_shared<Group>(name, std::vector<int>{0, 1}, 0,
                                 Milliseconds(1000), true);
}

TestOperation::Ptr broadcast(const std::string& name, std::vector<int> values) {
  auto op = TestOperation::make(Kind::kBroadcast, group(name));
  op->outputs = {op->own(std::move(values))};
  return op;
}

std::string logOf(const std::vector<TestOperation::Ptr>& ops) {
  SetupLog log;
  for (const auto& op : ops) log.record(*op, log.reserve(*op));
  return log.serialize();
}

}  // namespace

TEST(results_come_back_in_the_order_of_each_group) {
  const auto large = std::vector<int>(20'000, 9);
  SetupLog log =
      SetupLog::parse(logOf({broadcast("a", {1, 2}), broadcast("b", {3}),
                             broadcast("a", large), broadcast("a", {4})}));
  auto b = broadcast("b", {0});
  auto first = broadcast("a", {0, 0});
  auto second = broadcast("a", std::vector<int>(20'000, 5));
  auto third = broadcast("a", {0});
  for (const auto& op : {first, b, second, third}) log.answer(*op);
  EXPECT_EQ(first->data[0][1], 2);
  EXPECT_EQ(second->data[0][0], 5);  // too large: left as it was
  EXPECT_EQ(third->data[0][0], 4);
  EXPECT_EQ(b->data[0][0], 3);
}

TEST(another_set_up_than_the_recorded_one_is_an_error) {
  SetupLog log = SetupLog::parse(logOf({broadcast("a", {1, 2})}));
  auto unknown = broadcast("unknown", {7});
  log.answer(*unknown);  // a group that is not in the log is skipped
  EXPECT_EQ(unknown->data[0][0], 7);
  EXPECT_THROWS(CollectiveMismatch, log.answer(*broadcast("a", {1})));
  EXPECT_THROWS(CollectiveMismatch, log.answer(*broadcast("a", {1, 2})));
}

TEST(an_empty_log_answers_nothing) {
  SetupLog log = SetupLog::parse("");
  auto skipped = broadcast("a", {7});
  log.answer(*skipped);
  EXPECT_EQ(skipped->data[0][0], 7);
}

TEST(a_log_cut_or_changed_anywhere_is_refused) {
  const std::string good = logOf({broadcast("a", {1, 2}), broadcast("b", {3})});
  SetupLog::parse(good);
  for (size_t size = 1; size < good.size(); ++size)
    EXPECT_THROWS(std::invalid_argument, SetupLog::parse(good.substr(0, size)));
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] ^= 1;
    EXPECT_THROWS(std::invalid_argument, SetupLog::parse(bad));
  }
}

}  // namespace mnemosyne::testing
