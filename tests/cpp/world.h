// Several meshes in one process, with operations that a test can wait for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "ccl/mesh.h"
#include "ccl/operation.h"
#include "test.h"

namespace mnemosyne::testing {

using namespace ccl;  // NOLINT: tests only

// Owns its data. Shared, because the mesh may still hold it when a test fails.
class TestOperation final : public Operation {
 public:
  using Ptr = std::shared_ptr<TestOperation>;

  static Ptr make(Kind kind, std::shared_ptr<Group> group) {
    auto op = std::make_shared<TestOperation>();
    op->kind = kind;
    op->group = std::move(group);
    op->timeout = Milliseconds(20'000);
    return op;
  }

  void submit(Mesh& mesh, Ptr self) {
    self_ = std::move(self);
    mesh_ = &mesh;
    try {
      mesh.submit(this);
    } catch (...) {
      self_.reset();
      throw;
    }
  }

  // Waits, and throws what the operation ended with.
  void wait() {
    if (is_helping) mesh_->help(is_over_);
    std::unique_lock<std::mutex> lock(mu_);
    const bool done = changed_.wait_for(lock, std::chrono::seconds(30),
                                        [this] { return done_; });
    EXPECT(done);
    if (error_) std::rethrow_exception(error_);
  }

  bool isDone() {
    std::lock_guard<std::mutex> lock(mu_);
    return done_;
  }

  bool is_helping = true;              // whether wait() turns the engine
  std::vector<std::vector<int>> data;  // what inputs and outputs point to

  Buffer own(std::vector<int> values) {
    data.push_back(std::move(values));
    return {reinterpret_cast<std::byte*>(data.back().data()),
            data.back().size() * sizeof(int)};
  }

 private:
  void complete(std::exception_ptr error, CallbackThreads&) noexcept override {
    const Ptr self = std::move(self_);
    std::lock_guard<std::mutex> lock(mu_);
    error_ = std::move(error);
    done_ = true;
    is_over_ = true;
    changed_.notify_all();
  }

  std::mutex mu_;
  std::condition_variable changed_;
  bool done_ = false;
  std::atomic<bool> is_over_{false};
  Mesh* mesh_ = nullptr;
  std::exception_ptr error_;
  Ptr self_;
};

class World {
 public:
  World(int size, bool use_shm) : use_shm_(use_shm) {
    for (int rank = 0; rank < size; ++rank) {
      meshes.push_back(nullptr);
      members.push_back({});
      replace(rank);
    }
    seat();
  }

  // Puts a new worker on the rank; seat() tells the others.
  void replace(int rank) {
    meshes[rank] =
        std::make_unique<Mesh>(next_id_, "secret", "127.0.0.1", use_shm_);
    members[rank] = {next_id_++, meshes[rank]->address()};
  }

  int seat(int rank) { return meshes[rank]->reconfigure(epoch, rank, members); }

  std::vector<int> seat() {
    ++epoch;
    std::vector<int> replaced;
    for (int rank = 0; rank < size(); ++rank) replaced.push_back(seat(rank));
    return replaced;
  }

  int size() const { return static_cast<int>(meshes.size()); }

  // The group of all ranks, as one of them sees it.
  std::shared_ptr<Group> group(int rank, const std::string& name = "world") {
    std::vector<int> ranks(size());
    std::iota(ranks.begin(), ranks.end(), 0);
    return std::make_shared<Group>(name, ranks, rank, Milliseconds(20'000),
                                   true);
  }

  TestOperation::Ptr allReduce(const std::shared_ptr<Group>& group,
                               size_t count) {
    auto op = TestOperation::make(Kind::kAllReduce, group);
    op->type = DataType::kInt32;
    op->outputs = {op->own(std::vector<int>(count, group->rank() + 1))};
    start(op);
    return op;
  }

  TestOperation::Ptr send(const std::shared_ptr<Group>& group, int to,
                          uint64_t tag, std::vector<int> values) {
    auto op = TestOperation::make(Kind::kSend, group);
    op->root = to;
    op->tag = tag;
    op->inputs = {op->own(std::move(values))};
    start(op);
    return op;
  }

  TestOperation::Ptr recv(const std::shared_ptr<Group>& group, int from,
                          uint64_t tag, size_t count) {
    auto op =
        TestOperation::make(from < 0 ? Kind::kRecvAny : Kind::kRecv, group);
    op->root = from;
    op->tag = tag;
    op->outputs = {op->own(std::vector<int>(count))};
    start(op);
    return op;
  }

  TestOperation::Ptr barrier(const std::shared_ptr<Group>& group) {
    auto op = TestOperation::make(Kind::kBarrier, group);
    start(op);
    return op;
  }

  void start(const TestOperation::Ptr& op) {
    op->submit(*meshes[op->group->rank()], op);
  }

  // All ranks all-reduce; throws unless all of them get the sum.
  void checkAllReduce(std::vector<std::shared_ptr<Group>>& groups,
                      size_t count) {
    std::vector<TestOperation::Ptr> ops;
    for (auto& group : groups) ops.push_back(allReduce(group, count));
    const int sum = size() * (size() + 1) / 2;
    for (auto& op : ops) {
      op->wait();
      for (int value : op->data[0]) EXPECT_EQ(value, sum);
    }
  }

  std::vector<std::shared_ptr<Group>> groups(
      const std::string& name = "world") {
    std::vector<std::shared_ptr<Group>> all;
    for (int rank = 0; rank < size(); ++rank) all.push_back(group(rank, name));
    return all;
  }

  std::vector<std::unique_ptr<Mesh>> meshes;
  std::vector<Mesh::Member> members;
  int64_t epoch = 0;

 private:
  const bool use_shm_;
  uint64_t next_id_ = 1;
};

// The type of error that an operation ended with.
template <typename Error>
bool endsWith(const TestOperation::Ptr& op) {
  try {
    op->wait();
  } catch (const Error&) {
    return true;
  }
  return false;
}

}  // namespace mnemosyne::testing
