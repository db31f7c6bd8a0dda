#include "ccl/backend.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/List.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "ccl/backend_tensors.h"

namespace mnemosyne::ccl {
namespace {

using c10d::OpType;

// Waits for all operations of a coalescing block.
class CoalescedWork final : public c10d::Work {
 public:
  CoalescedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(rank, OpType::COALESCED), works_(std::move(works)) {}

  bool isCompleted() override {
    for (const auto& work : works_)
      if (!work->isCompleted()) return false;
    return true;
  }
  bool isSuccess() const override { return exception() == nullptr; }
  std::exception_ptr exception() const override {
    for (const auto& work : works_)
      if (auto error = work->exception()) return error;
    return nullptr;
  }
  bool wait(std::chrono::milliseconds timeout) override {
    for (const auto& work : works_) work->wait(timeout);
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  std::vector<at::Tensor> result() override {
    std::vector<at::Tensor> all;
    for (const auto& work : works_)
      for (const at::Tensor& tensor : work->result()) all.push_back(tensor);
    return all;
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

void appendTensors(std::vector<at::Tensor>* all, const c10::IValue& value) {
  if (value.isTensor()) return all->push_back(value.toTensor());
  for (const c10::IValue& each : value.toListRef()) appendTensors(all, each);
}

// Its value is the tensors of all operations, one after another.
c10::intrusive_ptr<c10::ivalue::Future> CoalescedWork::getFuture() {
  const auto tensors = c10::ListType::create(c10::TensorType::get());
  c10::List<c10::intrusive_ptr<c10::ivalue::Future>> futures(
      c10::FutureType::create(tensors));
  for (const auto& work : works_) futures.push_back(work->getFuture());
  return c10::collectAll(std::move(futures))
      ->then(
          [](c10::ivalue::Future& ended) {
            std::vector<at::Tensor> all;
            for (const c10::IValue& each : ended.value().toListRef())
              appendTensors(&all, each.toFuture()->value());
            return c10::IValue(std::move(all));
          },
          tensors);
}

}  // namespace

// ---------------------------------------------------------------- Ongoing

bool Ongoing::isFirst(uint64_t number) const {
  return std::none_of(numbers_.begin(), numbers_.end(),
                      [&](uint64_t other) { return other < number; });
}

void Ongoing::begin(uint64_t number) {
  std::lock_guard<std::mutex> lock(mu_);
  numbers_.push_back(number);
}

void Ongoing::end(uint64_t number) {
  std::vector<std::function<void()>> actions;
  {
    std::lock_guard<std::mutex> lock(mu_);
    std::erase(numbers_, number);
    std::erase_if(waiters_, [&](Waiter& waiter) {
      if (!isFirst(waiter.number)) return false;
      actions.push_back(std::move(waiter.action));
      return true;
    });
  }
  for (const auto& action : actions) action();
}

void Ongoing::afterThoseBefore(uint64_t number, std::function<void()> action) {
  {
    std::lock_guard<std::mutex> lock(mu_);
    if (!isFirst(number)) {
      waiters_.push_back({number, std::move(action)});
      return;
    }
  }
  action();
}

// ---------------------------------------------------------------- BackendWork

Buffer BackendWork::read(const at::Tensor& tensor) {
  kept_.push_back(plain(tensor));
  return bufferOf(kept_.back());
}

Buffer BackendWork::write(const at::Tensor& tensor, bool is_filled) {
  if (isPlain(tensor)) {
    kept_.push_back(tensor);
    return bufferOf(tensor);
  }
  TORCH_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
              "mnemosyne: elements of an output share memory");
  at::Tensor staged = at::empty(tensor.sizes(), tensor.options());
  if (is_filled) staged.copy_(tensor.detach());
  unstaged_.emplace_back(tensor.detach(), staged);
  return bufferOf(staged);
}

Buffer BackendWork::stage(size_t size) {
  kept_.push_back(at::empty({static_cast<int64_t>(size)}, at::kByte));
  return bufferOf(kept_.back());
}

void BackendWork::copyBack(const Buffer& to, const Buffer& from) {
  unpacked_.emplace_back(to, from);
}

void BackendWork::setResult(std::vector<at::Tensor> tensors) {
  results_ = {std::move(tensors)};
}

void BackendWork::setResult(std::vector<std::vector<at::Tensor>> lists) {
  results_ = std::move(lists);
}

void BackendWork::submitTo(const std::shared_ptr<Mesh>& mesh, uint64_t number,
                           std::shared_ptr<Ongoing> ongoing) {
  engine_ = mesh;
  number_ = number;
  ongoing_ = std::move(ongoing);
  if (ongoing_) ongoing_->begin(number_);
  self_ = c10::intrusive_ptr<BackendWork>::reclaim_copy(this);
  try {
    mesh->submit(this);
  } catch (...) {
    if (ongoing_) ongoing_->end(number_);
    self_.reset();
    throw;
  }
}

void BackendWork::unstage() {
  for (const auto& [to, from] : unpacked_) copyBytes(to, from);
  if (unstaged_.empty()) return;
  const at::NoGradGuard no_grad;
  for (const auto& [to, from] : unstaged_) to.copy_(from);
}

// A barrier ends when what its own rank has begun before it has ended too.
void BackendWork::complete(std::exception_ptr error,
                           CallbackThreads& callbacks) noexcept {
  const std::shared_ptr<Ongoing> ongoing = ongoing_;
  const uint64_t number = number_;
  if (ongoing && kind == Kind::kBarrier && !error) {
    ongoing->afterThoseBefore(number, [this, &callbacks] {
      const std::shared_ptr<Ongoing> kept = ongoing_;
      const uint64_t own = number_;
      conclude(nullptr, callbacks);
      kept->end(own);
    });
    return;
  }
  conclude(std::move(error), callbacks);
  if (ongoing) ongoing->end(number);
}

void BackendWork::conclude(std::exception_ptr error,
                           CallbackThreads& callbacks) noexcept {
  // Whoever drops the last reference destroys tensors, for which it may need
  // the interpreter's lock.
  auto self = std::move(self_);
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    completed_ = true;
    exception_ = std::move(error);
    future = future_;
    if (recordFunctionEndCallback_) {
      recordFunctionEndCallback_();
      recordFunctionEndCallback_ = nullptr;
    }
  }
  is_over_.store(true, std::memory_order_release);
  cv_.notify_all();
  if (!future && self.use_count() > 1) return;
  callbacks.run([self = std::move(self), future = std::move(future)] {
    if (future) self->settle(future);
  });
}

bool BackendWork::wait(std::chrono::milliseconds timeout) {
  if (timeout == kNoTimeout && !is_over_.load(std::memory_order_acquire))
    if (const std::shared_ptr<Mesh> mesh = engine_.lock()) mesh->help(is_over_);
  std::unique_lock<std::mutex> lock(mutex_);
  if (timeout == kNoTimeout) {
    // The operation's own deadline ends it.
    cv_.wait(lock, [this] { return completed_; });
  } else if (!cv_.wait_for(lock, timeout, [this] { return completed_; })) {
    lock.unlock();
    throwStillRunning(timeout);
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

void BackendWork::throwStillRunning(std::chrono::milliseconds waited) {
  std::string what = "waited " + std::to_string(waited.count()) + " ms for " +
                     name(kind) + " of group " + group->name() +
                     ", which is still running";
  int first = -1;
  int64_t epoch = -1;
  if (const std::shared_ptr<Mesh> mesh = engine_.lock()) {
    epoch = mesh->currentEpoch();
    for (const Mesh::Pending& pending : mesh->pending()) {
      if (pending.operation != this || pending.waits_for.empty()) continue;
      first = pending.waits_for[0];
      what += "; it waits for ranks [" + joined(pending.waits_for) + "]";
    }
  }
  throw CollectiveTimeout(what, first, epoch);
}

std::vector<at::Tensor> BackendWork::result() {
  TORCH_CHECK(isCompleted(), "the operation has not completed");
  TORCH_CHECK(results_.size() <= 1,
              "the operation has lists of results; use its future");
  return results_.empty() ? std::vector<at::Tensor>() : results_[0];
}

c10::intrusive_ptr<c10::ivalue::Future> BackendWork::getFuture() {
  bool is_over = false;
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!future_) {
      auto type = c10::ListType::create(c10::TensorType::get());
      if (results_.size() > 1) type = c10::ListType::create(type);
      future_ = c10::make_intrusive<c10::ivalue::Future>(type);
      is_over = completed_;
    }
    future = future_;
  }
  if (is_over) settle(future);
  return future;
}

void BackendWork::settle(
    const c10::intrusive_ptr<c10::ivalue::Future>& future) {
  if (exception_) {
    future->setErrorIfNeeded(exception_);
  } else if (results_.empty()) {
    future->markCompleted(c10::IValue(std::vector<at::Tensor>()));
  } else if (results_.size() == 1) {
    future->markCompleted(c10::IValue(results_[0]));
  } else {
    future->markCompleted(c10::IValue(results_));
  }
}

// ---------------------------------------------------------------- the group

c10::intrusive_ptr<c10d::Backend::Options>
MnemosyneBackend::getBackendOptions() {
  auto options = c10::make_intrusive<Options>("mnemosyne", timeout_.load());
  options->group_name = group()->name();
  options->group_desc = getGroupDesc();
  for (int rank = 0; rank < getSize(); ++rank)
    options->global_ranks_in_group.push_back(group()->globalRank(rank));
  return options;
}

// No communication: all members make the same name of it.
c10::intrusive_ptr<c10d::Backend> MnemosyneBackend::split(
    const c10::intrusive_ptr<c10d::Store>&, const std::vector<int>& ranks,
    const c10::intrusive_ptr<Options>& opts) {
  const std::string name =
      opts->group_name + "#" + std::to_string(next_split_++);
  std::vector<int> global_ranks;
  for (const int rank : ranks) {
    checkRank("split", rank);
    global_ranks.push_back(group()->globalRank(rank));
  }
  if (std::find(ranks.begin(), ranks.end(), getRank()) == ranks.end())
    return nullptr;
  const std::shared_ptr<Group> parent = group();
  auto part = std::make_shared<Group>(name, std::move(global_ranks),
                                      parent->globalRank(parent->rank()),
                                      opts->timeout, parent->canAbsorb());
  mesh_->adopt(*part);
  return another(std::move(part), false);
}

void MnemosyneBackend::setTimeout(std::chrono::milliseconds timeout) {
  timeout_ = timeout;
}

c10::intrusive_ptr<BackendWork> MnemosyneBackend::make(
    Kind kind, OpType type, const char* title, const Tensors& inputs,
    std::chrono::milliseconds timeout) {
  auto work = c10::make_intrusive<BackendWork>(getRank(), type, title, inputs);
  work->kind = kind;
  if (!inputs.empty() && inputs[0].defined())
    work->type_name = c10::toString(inputs[0].scalar_type());
  work->group = group();
  work->timeout = timeout > Milliseconds(0) ? timeout : timeout_.load();
  return work;
}

MnemosyneBackend::WorkPtr MnemosyneBackend::launch(
    c10::intrusive_ptr<BackendWork> work) {
  const bool is_collective = work->kind != Kind::kSend &&
                             work->kind != Kind::kRecv &&
                             work->kind != Kind::kRecvAny;
  work->submitTo(mesh_, is_collective ? next_number_++ : next_number_.load(),
                 is_collective ? ongoing_ : nullptr);
  std::lock_guard<std::mutex> lock(coalescing_mu_);
  if (is_coalescing_) coalesced_.push_back(work);
  return work;
}

void MnemosyneBackend::startCoalescing() {
  std::lock_guard<std::mutex> lock(coalescing_mu_);
  is_coalescing_ = true;
  coalesced_.clear();
}

MnemosyneBackend::WorkPtr MnemosyneBackend::endCoalescing() {
  std::lock_guard<std::mutex> lock(coalescing_mu_);
  is_coalescing_ = false;
  return join(std::exchange(coalesced_, {}));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::join(
    std::vector<WorkPtr> works) const {
  return c10::make_intrusive<CoalescedWork>(getRank(), std::move(works));
}

void MnemosyneBackend::checkRank(const char* what, int64_t rank) const {
  TORCH_CHECK(rank >= 0 && rank < getSize(), "mnemosyne ", what, ": rank ",
              rank, " is not in a group of ", getSize());
}

}  // namespace mnemosyne::ccl
