// The engine as a c10d backend. Translation only: checks what the user gave,
// turns tensors into buffers, and operations into c10d::Work.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "ccl/group.h"
#include "ccl/mesh.h"
#include "ccl/operation.h"

namespace mnemosyne::ccl {

// The collectives of a group that have not ended. Thread-safe.
class Ongoing {
 public:
  void begin(uint64_t number);
  void end(uint64_t number);
  // Calls `action` when none with a lower number is left: at once, or in end().
  void afterThoseBefore(uint64_t number, std::function<void()> action);

 private:
  struct Waiter {
    uint64_t number;
    std::function<void()> action;
  };
  bool isFirst(uint64_t number) const;

  std::mutex mu_;
  std::vector<uint64_t> numbers_;  // guarded by mu_
  std::vector<Waiter> waiters_;    // guarded by mu_
};

class BackendWork : public c10d::Work, public Operation {
 public:
  BackendWork(int rank, c10d::OpType type, const char* title,
              const std::vector<at::Tensor>& inputs)
      : c10d::Work(rank, type, title, inputs) {}

  // ---- before it is submitted
  // The tensor's memory, or a contiguous copy of it.
  Buffer read(const at::Tensor& tensor);
  // As read(), and what is there at the end is copied back. `is_filled`: the
  // operation reads it too.
  Buffer write(const at::Tensor& tensor, bool is_filled = false);
  // Memory of its own, for what is packed into one message.
  Buffer stage(size_t size);
  // At the end, what the operation has written to `from` is copied.
  void copyBack(const Buffer& to, const Buffer& from);
  void setResult(std::vector<at::Tensor> tensors);
  void setResult(std::vector<std::vector<at::Tensor>> lists);
  // `number`: of its group's collectives before it. `ongoing`: null for a
  // message. Requires: called once; nothing above is called afterwards.
  void submitTo(const std::shared_ptr<Mesh>& mesh, uint64_t number,
                std::shared_ptr<Ongoing> ongoing);

  // ---- c10d::Work, any thread
  bool wait(std::chrono::milliseconds timeout) override;
  void synchronize() override { wait(kNoTimeout); }
  int sourceRank() const override { return source_rank; }
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override { return number_; }
  void abort() override {}

 protected:
  void unstage() override;

 private:
  void complete(std::exception_ptr error,
                CallbackThreads& callbacks) noexcept override;
  void conclude(std::exception_ptr error, CallbackThreads& callbacks) noexcept;
  void settle(const c10::intrusive_ptr<c10::ivalue::Future>& future);
  [[noreturn]] void throwStillRunning(std::chrono::milliseconds waited);

  std::weak_ptr<Mesh> engine_;  // to help while waiting; it does not outlive us
  std::atomic<bool> is_over_{false};
  uint64_t number_ = 0;
  std::shared_ptr<Ongoing> ongoing_;
  std::vector<std::vector<at::Tensor>> results_;
  std::vector<at::Tensor> kept_;                     // their memory is used
  std::vector<std::pair<Buffer, Buffer>> unpacked_;  // to, from
  std::vector<std::pair<at::Tensor, at::Tensor>> unstaged_;  // to, from
  c10::intrusive_ptr<BackendWork> self_;  // from submission to completion
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // guarded by mutex_
};

// From torch 2.14 on these are c10d's own. docs/design.md, "Verbs".
#ifdef C10D_BACKEND_HAS_RECONFIGURE
using ReconfigureHandle = c10d::ReconfigureHandle;
using ReconfigureOptions = c10d::ReconfigureOptions;
#define MNEMOSYNE_OVERRIDE_2_14 override
#else
using ReconfigureHandle = std::string;
struct ReconfigureOptions {
  int64_t uuid = 0;  // names this instance of the group; never used twice
  // In the order of the new ranks, or a set in which the order is up to us.
  std::variant<std::unordered_set<ReconfigureHandle>,
               std::vector<ReconfigureHandle>>
      handles;
  std::optional<std::chrono::milliseconds> timeout;
  std::unordered_map<std::string, std::string> hints;  // we have none
};
#define MNEMOSYNE_OVERRIDE_2_14
#endif

struct Handle;

// One process group. Thread-safe as far as c10d demands: operations of one
// group are submitted in one order.
class MnemosyneBackend : public c10d::Backend {
 public:
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  // Requires: the mesh has adopted the group. `is_world`: it is the group of
  // all, so that to reconfigure it is to reconfigure the mesh.
  MnemosyneBackend(std::shared_ptr<Mesh> mesh, std::shared_ptr<Group> group,
                   bool is_world)
      : c10d::Backend(group->rank(), group->size()),
        is_world_(is_world),
        mesh_(std::move(mesh)),
        group_(std::move(group)),
        timeout_(group_->timeout()) {}

  const std::string getBackendName() const override { return "mnemosyne"; }
  c10::intrusive_ptr<Options> getBackendOptions() override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(
      const c10::intrusive_ptr<c10d::Store>& store,
      const std::vector<int>& ranks,
      const c10::intrusive_ptr<Options>& opts) override;
  // The group that it is now; reconfigure() puts another in its place.
  std::shared_ptr<Group> group() const {
    std::lock_guard<std::mutex> lock(group_mu_);
    return group_;
  }

  // ---- verbs.cc
  c10d::ErrorType getError() override;
  void abort() override;
  void shutdown() override;
  bool supportsShrinking() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> shrink(
      const std::vector<int64_t>& ranks_to_exclude, int shrink_flags,
      const c10::intrusive_ptr<Options>& opts_override) override;
  bool supportsReconfigure() const MNEMOSYNE_OVERRIDE_2_14 { return true; }
  ReconfigureHandle get_reconfigure_handle() const MNEMOSYNE_OVERRIDE_2_14;
  c10::intrusive_ptr<c10d::Work> reconfigure(const ReconfigureOptions& opts)
      MNEMOSYNE_OVERRIDE_2_14;
  // Goes on with other ranks of the mesh's membership, without talking to
  // anybody: all members do it.
  void reseat(std::vector<int> global_ranks);

  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return next_number_; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions&) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions&) override;
  WorkPtr allreduce_sparse(Tensors& tensors,
                           const c10d::AllreduceOptions&) override;
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions&) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions&) override;
  WorkPtr allgather(TensorLists& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions&) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions&) override;
  WorkPtr allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                              const c10d::AllgatherOptions&) override;
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs,
      const c10d::AllgatherOptions&) override;
  WorkPtr gather(TensorLists& outputs, Tensors& inputs,
                 const c10d::GatherOptions&) override;
  WorkPtr scatter(Tensors& outputs, TensorLists& inputs,
                  const c10d::ScatterOptions&) override;
  WorkPtr reduce_scatter(Tensors& outputs, TensorLists& inputs,
                         const c10d::ReduceScatterOptions&) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions&) override;
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs,
      const c10d::ReduceScatterOptions&) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input,
                        std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits,
                        const c10d::AllToAllOptions&) override;
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs,
                   const c10d::AllToAllOptions&) override;
  WorkPtr send(Tensors& tensors, int rank, int tag) override;
  WorkPtr recv(Tensors& tensors, int rank, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;
  WorkPtr barrier(const c10d::BarrierOptions&) override;
  void monitoredBarrier(const c10d::BarrierOptions&, bool) override;

 protected:
  const std::shared_ptr<Mesh>& mesh() const { return mesh_; }
  // Another one of this kind.
  virtual c10::intrusive_ptr<MnemosyneBackend> another(
      std::shared_ptr<Group> group, bool is_world) const {
    return c10::make_intrusive<MnemosyneBackend>(mesh_, std::move(group),
                                                 is_world);
  }
  // One for several that are in flight already.
  WorkPtr join(std::vector<WorkPtr> works) const;
  virtual void takeSeats(std::vector<int> global_ranks, int64_t uuid);

 private:
  c10::intrusive_ptr<BackendWork> make(Kind kind, c10d::OpType type,
                                       const char* title, const Tensors& inputs,
                                       std::chrono::milliseconds timeout);
  WorkPtr launch(c10::intrusive_ptr<BackendWork> work);
  WorkPtr allreduceSparse(Tensors& tensors, const c10d::AllreduceOptions&);
  WorkPtr allgatherPacked(TensorLists& outputs, Tensors& inputs,
                          const c10d::AllgatherOptions&);
  void checkRank(const char* what, int64_t rank) const;
  WorkPtr join(Milliseconds timeout, bool follows);
  std::vector<int> moveMesh(const std::vector<Handle>& handles, int place);
  std::vector<int> seatsOf(const std::vector<Handle>& handles) const;

  const bool is_world_;
  const std::shared_ptr<Mesh> mesh_;
  mutable std::mutex group_mu_;
  std::shared_ptr<Group> group_;  // guarded by group_mu_
  std::mutex verbs_mu_;           // one shrink or reconfigure at a time
  std::set<int64_t> uuids_;       // guarded by verbs_mu_
  int64_t num_shrinks_ = 0;       // guarded by verbs_mu_
  std::atomic<std::chrono::milliseconds> timeout_;
  const std::shared_ptr<Ongoing> ongoing_ = std::make_shared<Ongoing>();
  // Of collectives: it is equal on all ranks, so messages do not count.
  std::atomic<uint64_t> next_number_{0};
  std::atomic<uint64_t> next_split_{0};
  std::mutex coalescing_mu_;
  bool is_coalescing_ = false;      // guarded by coalescing_mu_
  std::vector<WorkPtr> coalesced_;  // guarded by coalescing_mu_
};

}  // namespace mnemosyne::ccl
