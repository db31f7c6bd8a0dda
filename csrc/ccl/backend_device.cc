#include "ccl/backend_device.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "ccl/backend_tensors.h"
#include "ccl/setup_log.h"

namespace mnemosyne::ccl {
namespace {

using c10d::OpType;
using Future = c10::ivalue::Future;
using FuturePtr = c10::intrusive_ptr<Future>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

enum class Role { kInput, kOutput, kBoth };

template <typename T>
struct Argument {
  T* value;
  Role role;
};
template <typename T>
Argument<T> in(T& value) {
  return {&value, Role::kInput};
}
template <typename T>
Argument<T> out(T& value) {
  return {&value, Role::kOutput};
}
template <typename T>
Argument<T> both(T& value) {
  return {&value, Role::kBoth};
}

template <typename Call>
void forEach(at::Tensor& tensor, const Call& call) {
  if (tensor.defined()) call(tensor);
}
template <typename T, typename Call>
void forEach(std::vector<T>& list, const Call& call) {
  for (T& each : list) forEach(each, call);
}

// Sparse ones differ in size between ranks, and are small.
template <typename T>
size_t sizeOf(T& value) {
  size_t size = 0;
  forEach(value, [&](at::Tensor& tensor) {
    if (!tensor.is_sparse()) size += tensor.nbytes();
  });
  return size;
}

template <typename... Args>
Tensors outputsOf(const Args&... args) {
  Tensors all;
  [[maybe_unused]] const auto add = [&](const auto& arg) {
    if (arg.role != Role::kInput)
      forEach(*arg.value, [&](at::Tensor& tensor) { all.push_back(tensor); });
  };
  (add(args), ...);
  return all;
}

// Of the first tensor that is on one.
template <typename... Args>
std::optional<c10::Device> deviceOf(const Args&... args) {
  std::optional<c10::Device> device;
  [[maybe_unused]] const auto look = [&](const auto& arg) {
    forEach(*arg.value, [&](at::Tensor& tensor) {
      if (!device && !tensor.is_cpu()) device = tensor.device();
    });
  };
  (look(args), ...);
  return device;
}

// The same for who does not wait by a work: NCCL would give none, and nobody
// could tell whether it is done. The caller waits for the work in its place.
template <typename Options>
Options async(Options options) {
  if constexpr (requires { options.asyncOp; }) options.asyncOp = true;
  return options;
}

// Set while this thread's operations run over the mesh, though what they move
// may lie on what counts as a device in a test.
thread_local bool is_staging = false;

class Staging {
 public:
  Staging() { is_staging = true; }
  ~Staging() { is_staging = false; }
};

FuturePtr futureOf(const Tensors& tensors) {
  std::vector<c10::Device> devices;
  for (const at::Tensor& tensor : tensors)
    if (!tensor.is_cpu()) devices.push_back(tensor.device());
  std::sort(devices.begin(), devices.end(),
            [](auto a, auto b) { return a.index() < b.index(); });
  devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
  auto future = c10::make_intrusive<Future>(
      c10::ListType::create(c10::TensorType::get()), std::move(devices));
  future->markCompleted(c10::IValue(tensors));
  return future;
}

// An operation that has nothing to do: its outputs are as good as they get.
class DoneWork final : public c10d::Work {
 public:
  DoneWork(int rank, Tensors outputs)
      : c10d::Work(rank, OpType::UNKNOWN), outputs_(std::move(outputs)) {
    finish();
  }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return outputs_; }
  FuturePtr getFuture() override { return futureOf(outputs_); }

 private:
  const Tensors outputs_;
};

// An operation with copies in host memory: outputs are filled when it is waited
// for, as the stream's order has it with a device's own.
class StagedWork final : public c10d::Work {
 public:
  using Copies = std::vector<std::pair<at::Tensor, at::Tensor>>;  // to, from

  StagedWork(int rank, WorkPtr work, Copies copies, Tensors outputs)
      : c10d::Work(rank, work->retrieveOpType()),
        work_(std::move(work)),
        copies_(std::move(copies)),
        outputs_(std::move(outputs)) {}

  bool isCompleted() override { return work_->isCompleted(); }
  bool isSuccess() const override { return work_->isSuccess(); }
  std::exception_ptr exception() const override { return work_->exception(); }
  int sourceRank() const override { return work_->sourceRank(); }
  bool wait(std::chrono::milliseconds timeout) override {
    work_->wait(timeout);
    std::lock_guard<std::mutex> lock(mutex_);
    const at::NoGradGuard no_grad;
    for (const auto& [to, from] : std::exchange(copies_, {})) to.copy_(from);
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  Tensors result() override {
    wait(kNoTimeout);
    return outputs_;
  }
  FuturePtr getFuture() override {
    wait(kNoTimeout);
    return futureOf(outputs_);
  }

 private:
  const WorkPtr work_;
  Copies copies_;  // guarded by mutex_
  const Tensors outputs_;
};

// Fences the mesh if it is not yet: what one rank cannot do is everybody's
// failure. Returns if the failure is to be absorbed, else throws it. `epoch`:
// in which the operation began; a later one has nothing to do with it.
void absorb(Mesh& mesh, const Group& group, int64_t epoch,
            const std::string& why) {
  const StaleEpoch stale("group " + group.name() + " of epoch " +
                             std::to_string(epoch) +
                             " has ended on its device: " + why,
                         -1, epoch);
  if (mesh.currentEpoch() != epoch) throw stale;
  if (!mesh.hasFailed())
    mesh.fence("group " + group.name() + " failed on its device: " + why, -1);
  if (mesh.absorbsFailure() && group.canAbsorb()) return;
  if (const std::exception_ptr failure = mesh.failure())
    std::rethrow_exception(failure);
  throw stale;  // a new epoch has come in between
}

std::string describe(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const c10::Error& known) {
    return known.what_without_backtrace();
  } catch (const std::exception& known) {
    return known.what();
  }
}

// An operation of the inner backend; its failure is that of the mesh.
class InnerWork final : public c10d::Work {
 public:
  // `device`: of its tensors, if it has streams.
  InnerWork(int rank, WorkPtr work, std::shared_ptr<Inner> inner,
            std::optional<c10::Device> device, std::shared_ptr<Mesh> mesh,
            std::shared_ptr<Group> group, Tensors outputs)
      : c10d::Work(rank, work->retrieveOpType()),
        work_(std::move(work)),
        inner_(std::move(inner)),
        device_(device),
        mesh_(std::move(mesh)),
        group_(std::move(group)),
        outputs_(std::move(outputs)),
        epoch_(mesh_->currentEpoch()) {}

  bool isCompleted() override { return work_->isCompleted(); }
  bool isSuccess() const override { return exception() == nullptr; }
  std::exception_ptr exception() const override { return work_->exception(); }
  int sourceRank() const override { return work_->sourceRank(); }
  Tensors result() override { return work_->result(); }
  float getDuration() const override { return work_->getDuration(); }
  uint64_t getSequencenumber() const override {
    return work_->getSequencenumber();
  }
  void abort() override { work_->abort(); }
  bool wait(std::chrono::milliseconds timeout) override {
    return guard([&] { return work_->wait(timeout); });
  }
  void synchronize() override {
    guard([&] {
      work_->synchronize();
      return true;
    });
  }
  void blockCurrentStream() override {
    guard([&] {
      work_->blockCurrentStream();
      return true;
    });
  }
  FuturePtr getFuture() override {
    const FuturePtr future = work_->getFuture();
    return future->then(
        [mesh = mesh_, group = group_, epoch = epoch_,
         outputs = outputs_](Future& done) {
          if (!done.hasError()) return done.value();
          absorb(*mesh, *group, epoch, describe(done.exception_ptr()));
          return c10::IValue(outputs);
        },
        future->elementType());
  }

 private:
  template <typename Call>
  bool guard(const Call& call) {
    try {
      const bool is_done = call();
      if (device_ && !is_followed_.exchange(true))
        inner_->follow(work_, *device_);
      return is_done;
    } catch (...) {
      absorb(*mesh_, *group_, epoch_, describe(std::current_exception()));
      return true;
    }
  }

  const WorkPtr work_;
  const std::shared_ptr<Inner> inner_;
  const std::optional<c10::Device> device_;
  std::atomic<bool> is_followed_{false};
  const std::shared_ptr<Mesh> mesh_;
  const std::shared_ptr<Group> group_;
  const Tensors outputs_;
  const int64_t epoch_;
};

}  // namespace

// ---------------------------------------------------------------- ways

template <typename... Values>
bool DeviceBackend::isHere(Values&... values) const {
  bool is_here = false;
  const auto look = [&](at::Tensor& tensor) {
    is_here |= tensor.device().type() == device_;
  };
  if (!is_staging) (forEach(values, look), ...);
  return is_here;
}

template <typename Call, typename... Args>
WorkPtr DeviceBackend::run(const Route& route, const Call& call, Args... args) {
  // A newcomer makes its set-up alone: what it needs of it is in the log, and
  // so it must have gone over the mesh.
  const Mesh::Setup setup = mesh()->setup();
  if (setup != Mesh::Setup::kNone && Inner::isCapturing()) {
    throw ConfigError("group " + group()->name() +
                      " is used in a graph that is captured in front of the "
                      "first step; capture it in a step, since whoever "
                      "replaces a lost worker makes its set-up alone");
  }
  if (setup != Mesh::Setup::kNone && route.size <= kMaxResultBytes)
    return keep(runStaged(call, args...));
  if (setup == Mesh::Setup::kReplayed)
    return c10::make_intrusive<DoneWork>(getRank(), outputsOf(args...));
  return runInner(route, call, args...);
}

template <typename Call, typename... Args>
WorkPtr DeviceBackend::runStaged(const Call& call, Args... args) {
  StagedWork::Copies copies;
  const auto stage = [&](const auto& arg) {
    auto value = *arg.value;
    forEach(value, [&](at::Tensor& tensor) {
      const at::Tensor there = tensor;
      tensor = there.to(at::kCPU);
      if (arg.role != Role::kInput && !tensor.is_same(there))
        copies.emplace_back(there, tensor);
    });
    return value;
  };
  std::tuple values{stage(args)...};
  WorkPtr work;
  {
    const Staging staging;
    work =
        std::apply([&](auto&... each) { return call(*this, each...); }, values);
  }
  return c10::make_intrusive<StagedWork>(getRank(), std::move(work),
                                         std::move(copies), outputsOf(args...));
}

template <typename Call, typename... Args>
WorkPtr DeviceBackend::runInner(const Route& route, const Call& call,
                                Args... args) {
  const std::shared_ptr<Group> group = this->group();
  const int64_t epoch = mesh()->currentEpoch();
  // From here on a failure finds this group busy: whoever comes second, the
  // failure or the operation, sees the other.
  const Inner::Use use(*inner_);
  try {
    if (mesh()->hasFailed()) {
      absorb(*mesh(), *group, epoch, "");
    } else if (const auto inner =
                   connected(*group, epoch, route.to < 0 && route.from < 0)) {
      joinBundle(inner);
      WorkPtr work = call(*inner, *args.value...);
      // What is captured is not in flight, and its work must not be asked.
      std::optional<c10::Device> device;
      if (Inner::isCapturing()) {
        inner_->noteCaptured();
      } else {
        inner_->note(work, route.to, route.from);
        device = deviceOf(args...);
      }
      ++num_inner_;
      if (mesh()->hasFailed()) inner_->abort();
      if (!work) return nullptr;
      return keep(c10::make_intrusive<InnerWork>(getRank(), std::move(work),
                                                 inner_, device, mesh(), group,
                                                 outputsOf(args...)));
    }
  } catch (const c10::DistBackendError& error) {
    inner_->fail();
    fail(*group, epoch, error.what_without_backtrace());
  } catch (...) {
    // With no failure it is the caller's mistake.
    if (!mesh()->hasFailed()) throw;
    inner_->fail();
    fail(*group, epoch, "");
  }
  // What an absorbed operation leaves behind must be finite.
  const at::NoGradGuard no_grad;
  [[maybe_unused]] const auto clear = [](const auto& arg) {
    if (arg.role == Role::kOutput)
      forEach(*arg.value, [](at::Tensor& tensor) { tensor.zero_(); });
  };
  (clear(args), ...);
  return c10::make_intrusive<DoneWork>(getRank(), outputsOf(args...));
}

void DeviceBackend::eagerConnectSingleDevice(at::Device device) {
  std::lock_guard<std::mutex> lock(wishes_mu_);
  eager_device_ = device;
}

Inner::BackendPtr DeviceBackend::ready(const Group& group, int64_t epoch) {
  Inner::BackendPtr inner = inner_->get(group, epoch);
  std::optional<at::Device> device;
  std::optional<std::chrono::milliseconds> timeout;
  {
    std::lock_guard<std::mutex> lock(wishes_mu_);
    if (told_ == inner) return inner;
    told_ = inner;
    device = eager_device_;
    timeout = timeout_;
  }
  if (timeout) inner->setTimeout(*timeout);
  if (device) inner->eagerConnectSingleDevice(*device);
  return inner;
}

WorkPtr DeviceBackend::connect(Tensors first) {
  const Inner::BackendPtr inner = ready(*group(), mesh()->currentEpoch());
  if (first.empty()) return nullptr;
  inner_->meet(*group());
  WorkPtr work = inner->allreduce(first, async(c10d::AllreduceOptions()));
  inner_->note(work, -1, -1);
  return c10::make_intrusive<InnerWork>(getRank(), std::move(work), inner_,
                                        deviceOf(both(first)), mesh(), group(),
                                        first);
}

// Null if it cannot be had, and that is absorbed.
Inner::BackendPtr DeviceBackend::connected(const Group& group, int64_t epoch,
                                           bool is_collective) {
  try {
    Inner::BackendPtr inner = ready(group, epoch);
    if (is_collective) inner_->meet(group);
    return inner;
  } catch (...) {
    // Whatever it is, the others have what this rank has not.
    fail(group, epoch, describe(std::current_exception()));
    return nullptr;
  }
}

// As absorb(); but nothing may leave a bundle open: its end tells.
void DeviceBackend::fail(const Group& group, int64_t epoch,
                         const std::string& why) {
  try {
    absorb(*mesh(), group, epoch, why);
  } catch (...) {
    std::lock_guard<std::mutex> lock(bundle_mu_);
    if (!is_bundling_) throw;
    bundle_error_ = std::current_exception();
  }
}

void DeviceBackend::look() {
  const std::exception_ptr error = inner_->failure();
  if (!error || mesh()->hasFailed()) return;
  mesh()->fence(
      "group " + group()->name() + " failed on its device: " + describe(error),
      -1);
}

// ---------------------------------------------------------------- bundles

void DeviceBackend::startCoalescing() {
  MnemosyneBackend::startCoalescing();
  std::lock_guard<std::mutex> lock(bundle_mu_);
  is_bundling_ = true;
  bundling_ = nullptr;
  bundle_use_.reset();
  bundle_.clear();
  bundle_error_ = nullptr;
}

// The inner one joins a bundle with its first operation: it is not asked for
// one that is the mesh's.
void DeviceBackend::joinBundle(const Inner::BackendPtr& inner) {
  std::lock_guard<std::mutex> lock(bundle_mu_);
  if (!is_bundling_ || bundling_ || !inner->supportsCoalescing()) return;
  inner->startCoalescing();
  bundling_ = inner;
  bundle_use_.emplace(*inner_);
}

WorkPtr DeviceBackend::keep(WorkPtr work) {
  std::lock_guard<std::mutex> lock(bundle_mu_);
  if (is_bundling_) bundle_.push_back(work);
  return work;
}

WorkPtr DeviceBackend::endCoalescing() {
  std::vector<WorkPtr> works = {MnemosyneBackend::endCoalescing()};
  const std::shared_ptr<Group> group = this->group();
  const int64_t epoch = mesh()->currentEpoch();
  const Inner::Use use(*inner_);
  std::lock_guard<std::mutex> lock(bundle_mu_);
  is_bundling_ = false;
  bundle_use_.reset();
  for (WorkPtr& work : std::exchange(bundle_, {}))
    works.push_back(std::move(work));
  std::exception_ptr error = std::exchange(bundle_error_, nullptr);
  if (const auto inner = std::exchange(bundling_, nullptr)) {
    try {
      if (WorkPtr work = inner->endCoalescing()) {
        if (!Inner::isCapturing()) inner_->watch(work);
        works.push_back(c10::make_intrusive<InnerWork>(
            getRank(), std::move(work), inner_, std::nullopt, mesh(), group,
            Tensors()));
      }
      if (mesh()->hasFailed()) inner_->abort();
    } catch (...) {
      inner_->fail();
      absorb(*mesh(), *group, epoch, describe(std::current_exception()));
    }
  }
  if (error) std::rethrow_exception(error);
  return MnemosyneBackend::join(std::move(works));
}

// ---------------------------------------------------------------- verbs

void DeviceBackend::setTimeout(std::chrono::milliseconds timeout) {
  MnemosyneBackend::setTimeout(timeout);
  {
    std::lock_guard<std::mutex> lock(wishes_mu_);
    timeout_ = timeout;
  }
  if (const auto inner = inner_->current()) inner->setTimeout(timeout);
}

void DeviceBackend::abort() {
  inner_->abort();
  MnemosyneBackend::abort();
}

void DeviceBackend::shutdown() {
  if (const auto inner = inner_->current()) inner->shutdown();
  inner_->drop();
  MnemosyneBackend::shutdown();
}

void DeviceBackend::takeSeats(std::vector<int> global_ranks, int64_t uuid) {
  inner_->abort();
  inner_->drop();
  MnemosyneBackend::takeSeats(std::move(global_ranks), uuid);
}

// ---------------------------------------------------------------- operations

WorkPtr DeviceBackend::broadcast(Tensors& tensors,
                                 const c10d::BroadcastOptions& opts) {
  if (!isHere(tensors)) return MnemosyneBackend::broadcast(tensors, opts);
  return run(
      {sizeOf(tensors)},
      [&](Backend& to, Tensors& a) { return to.broadcast(a, async(opts)); },
      both(tensors));
}

WorkPtr DeviceBackend::allreduce(Tensors& tensors,
                                 const c10d::AllreduceOptions& opts) {
  if (!isHere(tensors)) return MnemosyneBackend::allreduce(tensors, opts);
  return run(
      {sizeOf(tensors)},
      [&](Backend& to, Tensors& a) { return to.allreduce(a, async(opts)); },
      both(tensors));
}

WorkPtr DeviceBackend::allreduce_sparse(Tensors& tensors,
                                        const c10d::AllreduceOptions& opts) {
  if (!isHere(tensors))
    return MnemosyneBackend::allreduce_sparse(tensors, opts);
  return run(
      {sizeOf(tensors)},
      [&](Backend& to, Tensors& a) {
        return to.allreduce_sparse(a, async(opts));
      },
      both(tensors));
}

WorkPtr DeviceBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  if (!isHere(tensors))
    return MnemosyneBackend::allreduce_coalesced(tensors, opts);
  return run(
      {sizeOf(tensors)},
      [&](Backend& to, Tensors& a) {
        return to.allreduce_coalesced(a, async(opts));
      },
      both(tensors));
}

WorkPtr DeviceBackend::reduce(Tensors& tensors,
                              const c10d::ReduceOptions& opts) {
  if (!isHere(tensors)) return MnemosyneBackend::reduce(tensors, opts);
  return run(
      {sizeOf(tensors)},
      [&](Backend& to, Tensors& a) { return to.reduce(a, async(opts)); },
      both(tensors));
}

WorkPtr DeviceBackend::allgather(TensorLists& outputs, Tensors& inputs,
                                 const c10d::AllgatherOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::allgather(outputs, inputs, opts);
  return run(
      {sizeOf(outputs)},
      [&](Backend& to, TensorLists& a, Tensors& b) {
        return to.allgather(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

WorkPtr DeviceBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                       const c10d::AllgatherOptions& opts) {
  if (!isHere(output, input))
    return MnemosyneBackend::_allgather_base(output, input, opts);
  return run(
      {sizeOf(output)},
      [&](Backend& to, at::Tensor& a, at::Tensor& b) {
        return to._allgather_base(a, b, async(opts));
      },
      out(output), in(input));
}

WorkPtr DeviceBackend::allgather_coalesced(TensorLists& outputs,
                                           Tensors& inputs,
                                           const c10d::AllgatherOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::allgather_coalesced(outputs, inputs, opts);
  return run(
      {sizeOf(outputs)},
      [&](Backend& to, TensorLists& a, Tensors& b) {
        return to.allgather_coalesced(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

WorkPtr DeviceBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::allgather_into_tensor_coalesced(outputs, inputs,
                                                             opts);
  return run(
      {sizeOf(outputs)},
      [&](Backend& to, Tensors& a, Tensors& b) {
        return to.allgather_into_tensor_coalesced(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

// Only the root has outputs.
WorkPtr DeviceBackend::gather(TensorLists& outputs, Tensors& inputs,
                              const c10d::GatherOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::gather(outputs, inputs, opts);
  return run(
      {sizeOf(inputs)},
      [&](Backend& to, TensorLists& a, Tensors& b) {
        return to.gather(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

// Only the root has inputs.
WorkPtr DeviceBackend::scatter(Tensors& outputs, TensorLists& inputs,
                               const c10d::ScatterOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::scatter(outputs, inputs, opts);
  return run(
      {sizeOf(outputs)},
      [&](Backend& to, Tensors& a, TensorLists& b) {
        return to.scatter(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

WorkPtr DeviceBackend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                      const c10d::ReduceScatterOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::reduce_scatter(outputs, inputs, opts);
  return run(
      {sizeOf(inputs)},
      [&](Backend& to, Tensors& a, TensorLists& b) {
        return to.reduce_scatter(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

WorkPtr DeviceBackend::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input,
    const c10d::ReduceScatterOptions& opts) {
  if (!isHere(output, input))
    return MnemosyneBackend::_reduce_scatter_base(output, input, opts);
  return run(
      {sizeOf(input)},
      [&](Backend& to, at::Tensor& a, at::Tensor& b) {
        return to._reduce_scatter_base(a, b, async(opts));
      },
      out(output), in(input));
}

WorkPtr DeviceBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::reduce_scatter_tensor_coalesced(outputs, inputs,
                                                             opts);
  return run(
      {sizeOf(inputs)},
      [&](Backend& to, Tensors& a, Tensors& b) {
        return to.reduce_scatter_tensor_coalesced(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

// Ranks may send unequal parts, and then have unequal sizes: in a set-up it is
// always the mesh's.
WorkPtr DeviceBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                     std::vector<int64_t>& output_splits,
                                     std::vector<int64_t>& input_splits,
                                     const c10d::AllToAllOptions& opts) {
  if (!isHere(output, input))
    return MnemosyneBackend::alltoall_base(output, input, output_splits,
                                           input_splits, opts);
  return run(
      {0},
      [&](Backend& to, at::Tensor& a, at::Tensor& b) {
        return to.alltoall_base(a, b, output_splits, input_splits, async(opts));
      },
      out(output), in(input));
}

WorkPtr DeviceBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                const c10d::AllToAllOptions& opts) {
  if (!isHere(outputs, inputs))
    return MnemosyneBackend::alltoall(outputs, inputs, opts);
  return run(
      {0},
      [&](Backend& to, Tensors& a, Tensors& b) {
        return to.alltoall(a, b, async(opts));
      },
      out(outputs), in(inputs));
}

WorkPtr DeviceBackend::send(Tensors& tensors, int rank, int tag) {
  if (!isHere(tensors)) return MnemosyneBackend::send(tensors, rank, tag);
  return run(
      {sizeOf(tensors), rank},
      [&](Backend& to, Tensors& a) { return to.send(a, rank, tag); },
      in(tensors));
}

WorkPtr DeviceBackend::recv(Tensors& tensors, int rank, int tag) {
  if (!isHere(tensors)) return MnemosyneBackend::recv(tensors, rank, tag);
  return run(
      {sizeOf(tensors), -1, rank},
      [&](Backend& to, Tensors& a) { return to.recv(a, rank, tag); },
      out(tensors));
}

// NCCL cannot, either.
WorkPtr DeviceBackend::recvAnysource(Tensors& tensors, int tag) {
  TORCH_CHECK(!isHere(tensors),
              "mnemosyne receives from any rank into host memory only");
  return MnemosyneBackend::recvAnysource(tensors, tag);
}

// Behind it all that was begun before it has ended.
WorkPtr DeviceBackend::barrier(const c10d::BarrierOptions& opts) {
  if (!is_staging && mesh()->setup() == Mesh::Setup::kNone &&
      inner_->hasCollectives())
    return runInner({0}, [&](Backend& to) { return to.barrier(async(opts)); });
  try {
    inner_->wait();
  } catch (...) {
    absorb(*mesh(), *group(), mesh()->currentEpoch(),
           describe(std::current_exception()));
  }
  return MnemosyneBackend::barrier(opts);
}

}  // namespace mnemosyne::ccl
