#include "ccl/backend.h"

#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <torch/csrc/distributed/c10d/Utils.hpp>

#include <cstring>
#include <utility>

namespace mnemosyne::ccl {
namespace {

using c10d::OpType;

DataType dataTypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBool:
      return DataType::kBool;
    case at::kChar:
      return DataType::kInt8;
    case at::kByte:
      return DataType::kUint8;
    case at::kShort:
      return DataType::kInt16;
    case at::kInt:
      return DataType::kInt32;
    case at::kLong:
      return DataType::kInt64;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kBFloat16:
      return DataType::kBfloat16;
    case at::kFloat:
      return DataType::kFloat32;
    case at::kDouble:
      return DataType::kFloat64;
    case at::kComplexFloat:
      return DataType::kComplex64;
    case at::kComplexDouble:
      return DataType::kComplex128;
    default:
      return DataType::kBytes;
  }
}

ReduceOp reduceOpOf(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return ReduceOp::kSum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::kAverage;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::kProduct;
    case c10d::ReduceOp::MIN:
      return ReduceOp::kMin;
    case c10d::ReduceOp::MAX:
      return ReduceOp::kMax;
    case c10d::ReduceOp::BAND:
      return ReduceOp::kBitAnd;
    case c10d::ReduceOp::BOR:
      return ReduceOp::kBitOr;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::kBitXor;
    default:
      TORCH_CHECK_VALUE(false, "mnemosyne: PREMUL_SUM is not supported");
  }
}

void checkTensor(const char* what, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), "mnemosyne ", what, ": undefined tensor");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && tensor.is_cpu(),
                    "mnemosyne ", what, ": expected a dense CPU tensor, got ",
                    tensor.toString());
}

void checkTensors(const char* what, const std::vector<at::Tensor>& tensors,
                  size_t count) {
  TORCH_CHECK_VALUE(tensors.size() == count, "mnemosyne ", what, ": expected ",
                    count, " tensors, got ", tensors.size());
  for (const at::Tensor& tensor : tensors) {
    checkTensor(what, tensor);
    TORCH_CHECK_VALUE(tensor.scalar_type() == tensors[0].scalar_type(),
                      "mnemosyne ", what, ": tensors of different types");
  }
}

void checkNumel(const char* what, const at::Tensor& tensor, int64_t want) {
  TORCH_CHECK_VALUE(tensor.numel() == want, "mnemosyne ", what, ": expected ",
                    want, " elements, got ", tensor.numel());
}

void checkSameType(const char* what, const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type(), "mnemosyne ", what,
                    ": input is ", a.scalar_type(), ", output is ",
                    b.scalar_type());
}

void setReduction(BackendWork* work, const char* what, const at::Tensor& tensor,
                  const c10d::ReduceOp& op) {
  work->type = dataTypeOf(tensor);
  work->reduce_op = reduceOpOf(op);
  TORCH_CHECK_VALUE(canReduce(work->type, work->reduce_op), "mnemosyne ", what,
                    ": this reduction is not defined for ",
                    tensor.scalar_type());
}

bool isPlain(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

at::Tensor plain(const at::Tensor& tensor) {
  return isPlain(tensor) ? tensor
                         : tensor.resolve_conj().resolve_neg().contiguous();
}

Buffer bufferOf(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

// The n-th of `count` equal parts.
Buffer partOf(const Buffer& whole, int n, int count) {
  const size_t size = whole.size / count;
  return {whole.data + n * size, size};
}

void copyBytes(const Buffer& to, const Buffer& from) {
  if (from.size > 0) std::memcpy(to.data, from.data, from.size);
}

// Parts of a buffer, one after another.
class Packer {
 public:
  explicit Packer(const Buffer& whole) : whole_(whole) {}
  Buffer next(size_t size) {
    const Buffer part{whole_.data + used_, size};
    used_ += size;
    return part;
  }

 private:
  Buffer whole_;
  size_t used_ = 0;
};

size_t totalBytes(const std::vector<at::Tensor>& tensors) {
  size_t total = 0;
  for (const at::Tensor& tensor : tensors) total += tensor.nbytes();
  return total;
}

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

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace

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

void BackendWork::submitTo(const std::shared_ptr<Mesh>& mesh, uint64_t number) {
  number_ = number;
  engine_ = mesh;
  self_ = c10::intrusive_ptr<BackendWork>::reclaim_copy(this);
  try {
    mesh->submit(this);
  } catch (...) {
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

void BackendWork::complete(std::exception_ptr error,
                           CallbackThread& callbacks) noexcept {
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
    throw CollectiveTimeout("waited " + std::to_string(timeout.count()) +
                                " ms for an operation that is still running",
                            -1, -1);
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
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
  return c10::make_intrusive<Options>("mnemosyne", timeout_.load());
}

void MnemosyneBackend::setTimeout(std::chrono::milliseconds timeout) {
  timeout_ = timeout;
}

c10::intrusive_ptr<BackendWork> MnemosyneBackend::make(
    Kind kind, OpType type, const char* title, const Tensors& inputs,
    std::chrono::milliseconds timeout) {
  auto work = c10::make_intrusive<BackendWork>(getRank(), type, title, inputs);
  work->kind = kind;
  work->group = group();
  work->timeout = timeout > Milliseconds(0) ? timeout : timeout_.load();
  return work;
}

MnemosyneBackend::WorkPtr MnemosyneBackend::launch(
    c10::intrusive_ptr<BackendWork> work) {
  const bool is_collective = work->kind != Kind::kSend &&
                             work->kind != Kind::kRecv &&
                             work->kind != Kind::kRecvAny;
  work->submitTo(mesh_, is_collective ? next_number_++ : next_number_.load());
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
  return c10::make_intrusive<CoalescedWork>(getRank(),
                                            std::exchange(coalesced_, {}));
}

void MnemosyneBackend::checkRank(const char* what, int64_t rank) const {
  TORCH_CHECK_VALUE(rank >= 0 && rank < getSize(), "mnemosyne ", what,
                    ": rank ", rank, " is not in a group of ", getSize());
}

// ---------------------------------------------------------------- operations

MnemosyneBackend::WorkPtr MnemosyneBackend::broadcast(
    Tensors& tensors, const c10d::BroadcastOptions& opts) {
  checkTensors("broadcast", tensors, 1);
  checkRank("broadcast", opts.rootRank);
  auto work = make(Kind::kBroadcast, OpType::BROADCAST, "mnemosyne:broadcast",
                   tensors, opts.timeout);
  work->root = static_cast<int>(opts.rootRank);
  work->outputs = {getRank() == work->root ? work->read(tensors[0])
                                           : work->write(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allreduce(
    Tensors& tensors, const c10d::AllreduceOptions& opts) {
  checkTensors("all_reduce", tensors, 1);
  auto work = make(Kind::kAllReduce, OpType::ALLREDUCE, "mnemosyne:all_reduce",
                   tensors, opts.timeout);
  setReduction(work.get(), "all_reduce", tensors[0], opts.reduceOp);
  work->outputs = {work->write(tensors[0], true)};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  TORCH_CHECK_VALUE(!tensors.empty(), "mnemosyne all_reduce: no tensors");
  checkTensors("all_reduce", tensors, tensors.size());
  auto work = make(Kind::kAllReduce, OpType::ALLREDUCE_COALESCED,
                   "mnemosyne:all_reduce", tensors, opts.timeout);
  setReduction(work.get(), "all_reduce", tensors[0], opts.reduceOp);
  const Buffer packed = work->stage(totalBytes(tensors));
  Packer parts(packed);
  for (const at::Tensor& tensor : tensors) {
    const Buffer own = work->write(tensor, true);
    const Buffer part = parts.next(own.size);
    copyBytes(part, own);
    work->copyBack(own, part);
  }
  work->outputs = {packed};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::reduce(
    Tensors& tensors, const c10d::ReduceOptions& opts) {
  checkTensors("reduce", tensors, 1);
  checkRank("reduce", opts.rootRank);
  auto work = make(Kind::kReduce, OpType::REDUCE, "mnemosyne:reduce", tensors,
                   opts.timeout);
  setReduction(work.get(), "reduce", tensors[0], opts.reduceOp);
  work->root = static_cast<int>(opts.rootRank);
  work->outputs = {getRank() == work->root ? work->write(tensors[0], true)
                                           : work->read(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allgather(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  checkTensors("all_gather", inputs, 1);
  TORCH_CHECK_VALUE(outputs.size() == 1,
                    "mnemosyne all_gather: expected one list of outputs");
  checkTensors("all_gather", outputs[0], getSize());
  checkSameType("all_gather", inputs[0], outputs[0][0]);
  checkNumel("all_gather", outputs[0][getRank()], inputs[0].numel());
  auto work = make(Kind::kAllGather, OpType::ALLGATHER, "mnemosyne:all_gather",
                   inputs, opts.timeout);
  work->inputs = {work->read(inputs[0])};
  for (const at::Tensor& output : outputs[0])
    work->outputs.push_back(work->write(output));
  work->setResult(outputs[0]);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::_allgather_base(
    at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) {
  checkTensor("all_gather_into_tensor", input);
  checkTensor("all_gather_into_tensor", output);
  checkSameType("all_gather_into_tensor", input, output);
  checkNumel("all_gather_into_tensor", output, input.numel() * getSize());
  auto work = make(Kind::kAllGather, OpType::_ALLGATHER_BASE,
                   "mnemosyne:all_gather_into_tensor", {input}, opts.timeout);
  work->inputs = {work->read(input)};
  const Buffer whole = work->write(output);
  for (int rank = 0; rank < getSize(); ++rank)
    work->outputs.push_back(partOf(whole, rank, getSize()));
  work->setResult(Tensors{output});
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allgather_coalesced(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  const char* what = "all_gather_coalesced";
  TORCH_CHECK_VALUE(static_cast<int>(outputs.size()) == getSize(), "mnemosyne ",
                    what, ": expected one list of outputs per rank");
  for (const at::Tensor& input : inputs) checkTensor(what, input);
  auto work = make(Kind::kAllGather, OpType::ALLGATHER_COALESCED,
                   "mnemosyne:all_gather_coalesced", inputs, opts.timeout);
  const size_t row = totalBytes(inputs);
  const Buffer packed = work->stage(row);
  const Buffer gathered = work->stage(row * getSize());
  Packer own(packed);
  Packer rows(gathered);
  for (const at::Tensor& input : inputs)
    copyBytes(own.next(input.nbytes()), work->read(input));
  work->inputs = {packed};
  for (int rank = 0; rank < getSize(); ++rank) {
    work->outputs.push_back(partOf(gathered, rank, getSize()));
    TORCH_CHECK_VALUE(outputs[rank].size() == inputs.size(), "mnemosyne ", what,
                      ": lists of different lengths");
    for (size_t i = 0; i < inputs.size(); ++i) {
      checkTensor(what, outputs[rank][i]);
      checkSameType(what, inputs[i], outputs[rank][i]);
      checkNumel(what, outputs[rank][i], inputs[i].numel());
      work->copyBack(work->write(outputs[rank][i]),
                     rows.next(inputs[i].nbytes()));
    }
  }
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  const char* what = "all_gather_into_tensor_coalesced";
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "mnemosyne ", what,
                    ": lists of different lengths");
  for (size_t i = 0; i < inputs.size(); ++i) {
    checkTensor(what, inputs[i]);
    checkTensor(what, outputs[i]);
    checkSameType(what, inputs[i], outputs[i]);
    checkNumel(what, outputs[i], inputs[i].numel() * getSize());
  }
  auto work = make(Kind::kAllGather, OpType::_ALLGATHER_BASE,
                   "mnemosyne:all_gather_into_tensor", inputs, opts.timeout);
  const size_t row = totalBytes(inputs);
  const Buffer packed = work->stage(row);
  const Buffer gathered = work->stage(row * getSize());
  Packer own(packed);
  Packer rows(gathered);
  std::vector<Buffer> targets;
  for (size_t i = 0; i < inputs.size(); ++i) {
    copyBytes(own.next(inputs[i].nbytes()), work->read(inputs[i]));
    targets.push_back(work->write(outputs[i]));
  }
  work->inputs = {packed};
  for (int rank = 0; rank < getSize(); ++rank) {
    work->outputs.push_back(partOf(gathered, rank, getSize()));
    for (size_t i = 0; i < inputs.size(); ++i)
      work->copyBack(partOf(targets[i], rank, getSize()),
                     rows.next(inputs[i].nbytes()));
  }
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::gather(
    TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& opts) {
  checkTensors("gather", inputs, 1);
  checkRank("gather", opts.rootRank);
  auto work = make(Kind::kGather, OpType::GATHER, "mnemosyne:gather", inputs,
                   opts.timeout);
  work->root = static_cast<int>(opts.rootRank);
  work->inputs = {work->read(inputs[0])};
  if (getRank() == work->root) {
    TORCH_CHECK_VALUE(outputs.size() == 1,
                      "mnemosyne gather: the root needs one list of outputs");
    checkTensors("gather", outputs[0], getSize());
    checkSameType("gather", inputs[0], outputs[0][0]);
    checkNumel("gather", outputs[0][work->root], inputs[0].numel());
    for (const at::Tensor& output : outputs[0])
      work->outputs.push_back(work->write(output));
    work->setResult(outputs[0]);
  } else {
    TORCH_CHECK_VALUE(outputs.empty(),
                      "mnemosyne gather: only the root has outputs");
  }
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::scatter(
    Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& opts) {
  checkTensors("scatter", outputs, 1);
  checkRank("scatter", opts.rootRank);
  auto work = make(Kind::kScatter, OpType::SCATTER, "mnemosyne:scatter",
                   inputs.empty() ? Tensors() : inputs[0], opts.timeout);
  work->root = static_cast<int>(opts.rootRank);
  work->outputs = {work->write(outputs[0])};
  if (getRank() == work->root) {
    TORCH_CHECK_VALUE(inputs.size() == 1,
                      "mnemosyne scatter: the root needs one list of inputs");
    checkTensors("scatter", inputs[0], getSize());
    checkSameType("scatter", inputs[0][0], outputs[0]);
    checkNumel("scatter", inputs[0][work->root], outputs[0].numel());
    for (const at::Tensor& input : inputs[0])
      work->inputs.push_back(work->read(input));
  } else {
    TORCH_CHECK_VALUE(inputs.empty(),
                      "mnemosyne scatter: only the root has inputs");
  }
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::reduce_scatter(
    Tensors& outputs, TensorLists& inputs,
    const c10d::ReduceScatterOptions& opts) {
  checkTensors("reduce_scatter", outputs, 1);
  TORCH_CHECK_VALUE(inputs.size() == 1,
                    "mnemosyne reduce_scatter: expected one list of inputs");
  checkTensors("reduce_scatter", inputs[0], getSize());
  checkSameType("reduce_scatter", inputs[0][0], outputs[0]);
  auto work = make(Kind::kReduceScatter, OpType::REDUCE_SCATTER,
                   "mnemosyne:reduce_scatter", inputs[0], opts.timeout);
  setReduction(work.get(), "reduce_scatter", outputs[0], opts.reduceOp);
  for (const at::Tensor& input : inputs[0]) {
    checkNumel("reduce_scatter", input, outputs[0].numel());
    work->inputs.push_back(work->read(input));
  }
  work->outputs = {work->write(outputs[0])};
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input,
    const c10d::ReduceScatterOptions& opts) {
  const char* what = "reduce_scatter_tensor";
  checkTensor(what, input);
  checkTensor(what, output);
  checkSameType(what, input, output);
  checkNumel(what, input, output.numel() * getSize());
  auto work = make(Kind::kReduceScatter, OpType::_REDUCE_SCATTER_BASE,
                   "mnemosyne:reduce_scatter_tensor", {input}, opts.timeout);
  setReduction(work.get(), what, output, opts.reduceOp);
  const Buffer whole = work->read(input);
  for (int rank = 0; rank < getSize(); ++rank)
    work->inputs.push_back(partOf(whole, rank, getSize()));
  work->outputs = {work->write(output)};
  work->setResult(Tensors{output});
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  const char* what = "reduce_scatter_tensor_coalesced";
  TORCH_CHECK_VALUE(!inputs.empty(), "mnemosyne ", what, ": no tensors");
  checkTensors(what, inputs, inputs.size());
  checkTensors(what, outputs, inputs.size());
  checkSameType(what, inputs[0], outputs[0]);
  auto work = make(Kind::kReduceScatter, OpType::_REDUCE_SCATTER_BASE,
                   "mnemosyne:reduce_scatter_tensor", inputs, opts.timeout);
  setReduction(work.get(), what, outputs[0], opts.reduceOp);
  const Buffer packed = work->stage(totalBytes(inputs));
  const Buffer reduced = work->stage(totalBytes(outputs));
  Packer columns(packed);
  Packer own(reduced);
  std::vector<Buffer> sources;
  for (const at::Tensor& input : inputs) sources.push_back(work->read(input));
  for (int rank = 0; rank < getSize(); ++rank) {
    work->inputs.push_back(partOf(packed, rank, getSize()));
    for (const Buffer& source : sources) {
      const Buffer part = partOf(source, rank, getSize());
      copyBytes(columns.next(part.size), part);
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    checkNumel(what, inputs[i], outputs[i].numel() * getSize());
    work->copyBack(work->write(outputs[i]), own.next(outputs[i].nbytes()));
  }
  work->outputs = {reduced};
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::alltoall_base(
    at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
    std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& opts) {
  const char* what = "all_to_all_single";
  checkTensor(what, input);
  checkTensor(what, output);
  checkSameType(what, input, output);
  c10d::checkSplitSizes(input_splits, input, getSize());
  c10d::checkSplitSizes(output_splits, output, getSize());
  auto work = make(Kind::kAllToAll, OpType::ALLTOALL_BASE,
                   "mnemosyne:all_to_all", {input}, opts.timeout);
  const auto cut = [&](const Buffer& whole, const at::Tensor& tensor,
                       const std::vector<int64_t>& splits) {
    std::vector<Buffer> parts;
    Packer packer(whole);
    const size_t row = tensor.dim() > 0 && tensor.size(0) > 0
                           ? whole.size / tensor.size(0)
                           : 0;
    for (int rank = 0; rank < getSize(); ++rank)
      parts.push_back(packer.next(splits.empty() ? whole.size / getSize()
                                                 : splits[rank] * row));
    return parts;
  };
  work->inputs = cut(work->read(input), input, input_splits);
  work->outputs = cut(work->write(output), output, output_splits);
  work->setResult(Tensors{output});
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::alltoall(
    Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) {
  checkTensors("all_to_all", inputs, getSize());
  checkTensors("all_to_all", outputs, getSize());
  checkSameType("all_to_all", inputs[0], outputs[0]);
  checkNumel("all_to_all", outputs[getRank()], inputs[getRank()].numel());
  auto work = make(Kind::kAllToAll, OpType::ALLTOALL, "mnemosyne:all_to_all",
                   inputs, opts.timeout);
  for (const at::Tensor& input : inputs)
    work->inputs.push_back(work->read(input));
  for (const at::Tensor& output : outputs)
    work->outputs.push_back(work->write(output));
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::send(Tensors& tensors, int rank,
                                                 int tag) {
  checkTensors("send", tensors, 1);
  checkRank("send", rank);
  TORCH_CHECK_VALUE(rank != getRank(), "mnemosyne send: to itself");
  auto work = make(Kind::kSend, OpType::SEND, "mnemosyne:send", tensors,
                   c10d::kUnsetTimeout);
  work->root = rank;
  work->tag = static_cast<uint64_t>(tag);
  work->inputs = {work->read(tensors[0])};
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::recv(Tensors& tensors, int rank,
                                                 int tag) {
  checkTensors("recv", tensors, 1);
  checkRank("recv", rank);
  TORCH_CHECK_VALUE(rank != getRank(), "mnemosyne recv: from itself");
  auto work = make(Kind::kRecv, OpType::RECV, "mnemosyne:recv", tensors,
                   c10d::kUnsetTimeout);
  work->root = rank;
  work->tag = static_cast<uint64_t>(tag);
  work->outputs = {work->write(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::recvAnysource(Tensors& tensors,
                                                          int tag) {
  checkTensors("recv", tensors, 1);
  auto work = make(Kind::kRecvAny, OpType::RECVANYSOURCE, "mnemosyne:recv",
                   tensors, c10d::kUnsetTimeout);
  work->tag = static_cast<uint64_t>(tag);
  work->outputs = {work->write(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::barrier(
    const c10d::BarrierOptions& opts) {
  return launch(make(Kind::kBarrier, OpType::BARRIER, "mnemosyne:barrier", {},
                     opts.timeout));
}

// Rank 0 names all that are missing, whatever `wait_all_ranks` is: it costs
// nothing.
void MnemosyneBackend::monitoredBarrier(const c10d::BarrierOptions& opts,
                                        bool /* wait_all_ranks */) {
  launch(make(Kind::kMonitoredBarrier, OpType::BARRIER,
              "mnemosyne:monitored_barrier", {}, opts.timeout))
      ->wait();
}

}  // namespace mnemosyne::ccl
