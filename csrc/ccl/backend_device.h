// A group that has tensors on devices, too: another backend moves them, and
// this one sees to it that it ends with a failure, and is made anew where a
// member was replaced. docs/design.md, "Groups on devices".
#pragma once

#include <optional>

#include "ccl/backend.h"
#include "ccl/backend_inner.h"

namespace mnemosyne::ccl {

class DeviceBackend final : public MnemosyneBackend {
 public:
  // `device`: the type of those that `make` makes backends for.
  DeviceBackend(std::shared_ptr<Mesh> mesh, std::shared_ptr<Group> group,
                bool is_world, c10::DeviceType device, Inner::Make make,
                Inner::Meet meet)
      : MnemosyneBackend(std::move(mesh), std::move(group), is_world),
        device_(device),
        make_(make),
        meet_(meet),
        inner_(std::make_shared<Inner>(std::move(make), std::move(meet))) {}

  Inner& inner() const { return *inner_; }
  // Makes the inner one if there is none, and reduces `first` with it, if that
  // is not empty. Collective.
  WorkPtr connect(Tensors first);

  // Fences the mesh if the inner one has failed, which may know more than links
  // do. Any thread.
  void look();

  bool supportsCoalescing() const override { return true; }
  uint64_t getSequenceNumberForGroup() override {
    return MnemosyneBackend::getSequenceNumberForGroup() + num_inner_;
  }
  // The first operation connects; a newcomer's set-up must not. That it was
  // asked for is kept: NCCL's sends and receives then wait for each other.
  void eagerConnectSingleDevice(at::Device device) override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  void abort() override;
  void shutdown() override;
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

 protected:
  c10::intrusive_ptr<MnemosyneBackend> another(std::shared_ptr<Group> group,
                                               bool is_world) const override {
    return c10::make_intrusive<DeviceBackend>(mesh(), std::move(group),
                                              is_world, device_, make_, meet_);
  }
  void takeSeats(std::vector<int> global_ranks, int64_t uuid) override;

 private:
  struct Route {
    size_t size;    // in bytes, the same on all ranks
    int to = -1;    // of a message
    int from = -1;  // of a message
  };

  // Whether any of these is on a device.
  template <typename... Values>
  bool isHere(Values&... values) const;
  // Runs `call(backend, values...)`.
  template <typename Call, typename... Args>
  WorkPtr run(const Route& route, const Call& call, Args... args);
  // Over the mesh, with copies in host memory.
  template <typename Call, typename... Args>
  WorkPtr runStaged(const Call& call, Args... args);
  template <typename Call, typename... Args>
  WorkPtr runInner(const Route& route, const Call& call, Args... args);
  void joinBundle(const Inner::BackendPtr& inner);
  WorkPtr keep(WorkPtr work);
  Inner::BackendPtr ready(const Group& group, int64_t epoch);
  Inner::BackendPtr connected(const Group& group, int64_t epoch,
                              bool is_collective);
  void fail(const Group& group, int64_t epoch, const std::string& why);

  const c10::DeviceType device_;
  const Inner::Make make_;
  const Inner::Meet meet_;
  const std::shared_ptr<Inner> inner_;
  std::atomic<uint64_t> num_inner_{0};  // operations
  // What the script wants of each inner backend that there will be.
  std::mutex wishes_mu_;
  std::optional<at::Device> eager_device_;            // guarded by wishes_mu_
  std::optional<std::chrono::milliseconds> timeout_;  // guarded by wishes_mu_
  Inner::BackendPtr told_;  // guarded by wishes_mu_: the one that knows of it
  std::mutex bundle_mu_;
  bool is_bundling_ = false;    // guarded by bundle_mu_
  Inner::BackendPtr bundling_;  // guarded by bundle_mu_: the one that coalesces
  // Guarded by bundle_mu_: its messages have no works before its end.
  std::optional<Inner::Use> bundle_use_;
  std::vector<WorkPtr> bundle_;      // guarded by bundle_mu_
  std::exception_ptr bundle_error_;  // guarded by bundle_mu_
};

}  // namespace mnemosyne::ccl
