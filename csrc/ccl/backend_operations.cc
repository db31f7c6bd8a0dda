// What c10d asks for, as operations of the engine.
#include <algorithm>
#include <utility>

#include <torch/csrc/distributed/c10d/Utils.hpp>

#include "ccl/backend.h"
#include "ccl/backend_tensors.h"

namespace mnemosyne::ccl {
namespace {

using c10d::OpType;

void setReduction(BackendWork* work, const char* what, const at::Tensor& tensor,
                  const c10d::ReduceOp& op) {
  work->type = dataTypeOf(tensor);
  work->reduce_op = reduceOpOf(op);
  TORCH_CHECK(canReduce(work->type, work->reduce_op), "mnemosyne ", what,
              ": this reduction is not defined for ", tensor.scalar_type());
}

uint64_t agreedOn(const at::Tensor& type_of, size_t num_bytes) {
  return (Agreement() << type_of << num_bytes).hash();
}

bool isSparse(const Tensors& tensors) {
  return !tensors.empty() && tensors[0].defined() && tensors[0].is_sparse();
}

bool haveOneType(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const at::Tensor& tensor) {
                       return tensor.scalar_type() == tensors[0].scalar_type();
                     });
}

// That all in a list can stand for one another.
void checkAlike(const char* what, const Tensors& tensors) {
  TORCH_CHECK(!tensors.empty(), "mnemosyne ", what,
              ": requires non-empty tensor list");
  checkTensors(what, tensors, tensors.size());
  for (const at::Tensor& tensor : tensors)
    checkSameShape(what, tensors[0], tensor);
}

// torch has a name of its own for this since 2.12.
template <typename Type>
constexpr Type reduceScatterCoalesced() {
  if constexpr (requires { Type::REDUCE_SCATTER_TENSOR_COALESCED; }) {
    return Type::REDUCE_SCATTER_TENSOR_COALESCED;
  } else {
    return Type::COALESCED;
  }
}

}  // namespace

// Of several tensors one is sent or received, the others get copies of it.
MnemosyneBackend::WorkPtr MnemosyneBackend::broadcast(
    Tensors& tensors, const c10d::BroadcastOptions& opts) {
  const char* what = "broadcast";
  checkRank(what, opts.rootRank);
  checkAlike(what, tensors);
  TORCH_CHECK(opts.rootTensor >= 0 &&
                  opts.rootTensor < static_cast<int64_t>(tensors.size()),
              "mnemosyne broadcast: invalid root tensor: ", opts.rootTensor);
  auto work = make(Kind::kBroadcast, OpType::BROADCAST, "mnemosyne:broadcast",
                   tensors, opts.timeout);
  work->root = static_cast<int>(opts.rootRank);
  const at::Tensor& moved = tensors[opts.rootTensor];
  work->agreed = agreedOn(moved, moved.nbytes());
  const Buffer buffer =
      getRank() == work->root ? work->read(moved) : work->write(moved);
  for (const at::Tensor& tensor : tensors)
    if (!tensor.is_same(moved)) work->copyBack(work->write(tensor), buffer);
  work->outputs = {buffer};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allreduce(
    Tensors& tensors, const c10d::AllreduceOptions& opts) {
  const char* what = "all_reduce";
  if (isSparse(tensors)) return allreduceSparse(tensors, opts);
  checkAlike(what, tensors);
  auto work = make(Kind::kAllReduce, OpType::ALLREDUCE, "mnemosyne:all_reduce",
                   tensors, opts.timeout);
  setReduction(work.get(), what, tensors[0], opts.reduceOp);
  work->agreed = agreedOn(tensors[0], tensors[0].nbytes());
  if (tensors.size() == 1) {
    work->outputs = {work->write(tensors[0], true)};
  } else {
    const Buffer sum = work->stage(tensors[0].nbytes());
    copyBytes(sum, work->read(tensors[0]));
    for (size_t i = 1; i < tensors.size(); ++i)
      ccl::reduce(work->type, work->reduce_op, sum.data, sum.data,
                  work->read(tensors[i]).data, sum.size);
    for (const at::Tensor& tensor : tensors)
      work->copyBack(work->write(tensor), sum);
    work->outputs = {sum};
  }
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allreduce_sparse(
    Tensors& tensors, const c10d::AllreduceOptions& opts) {
  return allreduceSparse(tensors, opts);
}

MnemosyneBackend::WorkPtr MnemosyneBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  TORCH_CHECK(!tensors.empty(), "mnemosyne all_reduce: no tensors");
  checkTensors("all_reduce", tensors, tensors.size());
  auto work = make(Kind::kAllReduce, OpType::ALLREDUCE_COALESCED,
                   "mnemosyne:all_reduce", tensors, opts.timeout);
  setReduction(work.get(), "all_reduce", tensors[0], opts.reduceOp);
  work->agreed = agreedOn(tensors[0], totalBytes(tensors));
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
  work->agreed = agreedOn(tensors[0], tensors[0].nbytes());
  work->outputs = {getRank() == work->root ? work->write(tensors[0], true)
                                           : work->read(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

// The ranks' shares may differ in size, which gloo does not take.
MnemosyneBackend::WorkPtr MnemosyneBackend::allgather(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  const char* what = "all_gather";
  checkAlike(what, inputs);
  TORCH_CHECK(outputs.size() == inputs.size(), "mnemosyne ", what,
              ": expected one list of outputs per input");
  for (const Tensors& list : outputs) {
    checkTensors(what, list, inputs.size() * getSize());
    checkSameType(what, inputs[0], list[0]);
    checkSameShape(what, inputs[0], list[getRank() * inputs.size()]);
  }
  if (inputs.size() > 1) return allgatherPacked(outputs, inputs, opts);
  auto work = make(Kind::kAllGather, OpType::ALLGATHER, "mnemosyne:all_gather",
                   inputs, opts.timeout);
  work->agreed = agreedOn(inputs[0], totalBytes(outputs[0]));
  work->inputs = {work->read(inputs[0])};
  for (const at::Tensor& output : outputs[0])
    work->outputs.push_back(work->write(output));
  work->setResult(outputs[0]);
  return launch(std::move(work));
}

// Several inputs: those of a rank stand next to each other in each list.
MnemosyneBackend::WorkPtr MnemosyneBackend::allgatherPacked(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  for (const Tensors& list : outputs) checkAlike("all_gather", list);
  auto work = make(Kind::kAllGather, OpType::ALLGATHER, "mnemosyne:all_gather",
                   inputs, opts.timeout);
  const size_t row = totalBytes(inputs);
  work->agreed = agreedOn(inputs[0], row * getSize());
  const Buffer packed = work->stage(row);
  const Buffer gathered = work->stage(row * getSize());
  Packer own(packed);
  for (const at::Tensor& input : inputs)
    copyBytes(own.next(input.nbytes()), work->read(input));
  work->inputs = {packed};
  for (int rank = 0; rank < getSize(); ++rank)
    work->outputs.push_back(partOf(gathered, rank, getSize()));
  for (const Tensors& list : outputs) {
    Packer rows(gathered);
    for (const at::Tensor& output : list)
      work->copyBack(work->write(output), rows.next(output.nbytes()));
  }
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::_allgather_base(
    at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) {
  const char* what = "all_gather_into_tensor";
  checkTensor(what, input);
  checkTensor(what, output);
  checkSameType(what, input, output);
  checkNumel(what, output, input.numel() * getSize());
  auto work = make(Kind::kAllGather, OpType::_ALLGATHER_BASE,
                   "mnemosyne:_all_gather_base", {input}, opts.timeout);
  work->agreed = agreedOn(input, output.nbytes());
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
  TORCH_CHECK(static_cast<int>(outputs.size()) == getSize(), "mnemosyne ", what,
              ": expected one list of outputs per rank");
  TORCH_CHECK(!inputs.empty(), "mnemosyne ", what,
              ": requires non-empty input tensor list");
  Agreement agreed;
  for (const at::Tensor& input : inputs) {
    checkTensor(what, input);
    agreed << input << input.nbytes();
  }
  auto work = make(Kind::kAllGather, OpType::ALLGATHER_COALESCED,
                   "mnemosyne:all_gather_coalesced", inputs, opts.timeout);
  work->agreed = agreed.hash();
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
    TORCH_CHECK(outputs[rank].size() == inputs.size(), "mnemosyne ", what,
                ": lists of different lengths");
    for (size_t i = 0; i < inputs.size(); ++i) {
      checkTensor(what, outputs[rank][i]);
      checkSameType(what, inputs[i], outputs[rank][i]);
      checkSameShape(what, inputs[i], outputs[rank][i]);
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
  TORCH_CHECK(outputs.size() == inputs.size(), "mnemosyne ", what,
              ": lists of different lengths");
  Agreement agreed;
  for (size_t i = 0; i < inputs.size(); ++i) {
    checkTensor(what, inputs[i]);
    checkTensor(what, outputs[i]);
    checkSameType(what, inputs[i], outputs[i]);
    checkNumel(what, outputs[i], inputs[i].numel() * getSize());
    agreed << inputs[i] << inputs[i].nbytes();
  }
  auto work =
      make(Kind::kAllGather, OpType::COALESCED,
           "mnemosyne:all_gather_into_tensor_coalesced", inputs, opts.timeout);
  work->agreed = agreed.hash();
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
  work->agreed = agreedOn(inputs[0], 0);
  work->inputs = {work->read(inputs[0])};
  if (getRank() == work->root) {
    TORCH_CHECK(outputs.size() == 1,
                "mnemosyne gather: the root needs one list of outputs");
    checkTensors("gather", outputs[0], getSize());
    checkSameType("gather", inputs[0], outputs[0][0]);
    checkSameShape("gather", inputs[0], outputs[0][work->root]);
    for (const at::Tensor& output : outputs[0])
      work->outputs.push_back(work->write(output));
    work->setResult(outputs[0]);
  } else {
    TORCH_CHECK(outputs.empty(), "mnemosyne gather: only the root has outputs");
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
  work->agreed = agreedOn(outputs[0], 0);
  work->outputs = {work->write(outputs[0])};
  if (getRank() == work->root) {
    TORCH_CHECK(inputs.size() == 1,
                "mnemosyne scatter: the root needs one list of inputs");
    checkTensors("scatter", inputs[0], getSize());
    checkSameType("scatter", inputs[0][0], outputs[0]);
    checkSameShape("scatter", inputs[0][work->root], outputs[0]);
    for (const at::Tensor& input : inputs[0])
      work->inputs.push_back(work->read(input));
  } else {
    TORCH_CHECK(inputs.empty(), "mnemosyne scatter: only the root has inputs");
  }
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::reduce_scatter(
    Tensors& outputs, TensorLists& inputs,
    const c10d::ReduceScatterOptions& opts) {
  checkTensors("reduce_scatter", outputs, 1);
  TORCH_CHECK(inputs.size() == 1,
              "mnemosyne reduce_scatter: expected one list of inputs");
  checkTensors("reduce_scatter", inputs[0], getSize());
  checkSameType("reduce_scatter", inputs[0][0], outputs[0]);
  auto work = make(Kind::kReduceScatter, OpType::REDUCE_SCATTER,
                   "mnemosyne:reduce_scatter", inputs[0], opts.timeout);
  setReduction(work.get(), "reduce_scatter", outputs[0], opts.reduceOp);
  work->agreed = agreedOn(outputs[0], totalBytes(inputs[0]));
  for (const at::Tensor& input : inputs[0]) {
    checkSameShape("reduce_scatter", input, outputs[0]);
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
                   "mnemosyne:_reduce_scatter_base", {input}, opts.timeout);
  setReduction(work.get(), what, output, opts.reduceOp);
  work->agreed = agreedOn(input, input.nbytes());
  const Buffer whole = work->read(input);
  for (int rank = 0; rank < getSize(); ++rank)
    work->inputs.push_back(partOf(whole, rank, getSize()));
  work->outputs = {work->write(output)};
  work->setResult(Tensors{output});
  return launch(std::move(work));
}

// One operation for all, unless they are of different types.
MnemosyneBackend::WorkPtr MnemosyneBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  const char* what = "reduce_scatter_tensor_coalesced";
  TORCH_CHECK(!inputs.empty() && inputs.size() == outputs.size(), "mnemosyne ",
              what, ": requires lists of equal length, not empty");
  for (size_t i = 0; i < inputs.size(); ++i) {
    checkTensor(what, inputs[i]);
    checkTensor(what, outputs[i]);
    checkSameType(what, inputs[i], outputs[i]);
    checkNumel(what, inputs[i], outputs[i].numel() * getSize());
  }
  if (!haveOneType(inputs)) {
    std::vector<WorkPtr> works;
    for (size_t i = 0; i < inputs.size(); ++i)
      works.push_back(_reduce_scatter_base(outputs[i], inputs[i], opts));
    return join(std::move(works));
  }
  auto work =
      make(Kind::kReduceScatter, reduceScatterCoalesced<OpType>(),
           "mnemosyne:reduce_scatter_tensor_coalesced", inputs, opts.timeout);
  setReduction(work.get(), what, outputs[0], opts.reduceOp);
  work->agreed = agreedOn(inputs[0], totalBytes(inputs));
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
  work->agreed = agreedOn(input, 0);
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

// Sizes and types may differ from rank to rank.
MnemosyneBackend::WorkPtr MnemosyneBackend::alltoall(
    Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) {
  const char* what = "all_to_all";
  const auto count = static_cast<size_t>(getSize());
  TORCH_CHECK(inputs.size() == count && outputs.size() == count, "mnemosyne ",
              what, ": expected lists of ", count, " tensors, got ",
              inputs.size(), " and ", outputs.size());
  auto work = make(Kind::kAllToAll, OpType::ALLTOALL, "mnemosyne:all_to_all",
                   inputs, opts.timeout);
  for (size_t rank = 0; rank < count; ++rank) {
    checkTensor(what, inputs[rank]);
    checkTensor(what, outputs[rank]);
    work->inputs.push_back(work->read(inputs[rank]));
    work->outputs.push_back(work->write(outputs[rank]));
  }
  checkSameType(what, inputs[getRank()], outputs[getRank()]);
  checkNumel(what, outputs[getRank()], inputs[getRank()].numel());
  work->setResult(outputs);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::send(Tensors& tensors, int rank,
                                                 int tag) {
  checkTensors("send", tensors, 1);
  TORCH_CHECK(tag >= 0, "mnemosyne send: tag must be nonnegative, got ", tag);
  checkRank("send", rank);
  TORCH_CHECK(rank != getRank(), "mnemosyne send: to itself");
  auto work = make(Kind::kSend, OpType::SEND, "mnemosyne:send", tensors,
                   c10d::kUnsetTimeout);
  work->root = rank;
  work->tag = static_cast<uint64_t>(tag);
  work->agreed = agreedOn(tensors[0], 0);
  work->inputs = {work->read(tensors[0])};
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::recv(Tensors& tensors, int rank,
                                                 int tag) {
  checkTensors("recv", tensors, 1);
  TORCH_CHECK(tag >= 0, "mnemosyne recv: tag must be nonnegative, got ", tag);
  checkRank("recv", rank);
  TORCH_CHECK(rank != getRank(), "mnemosyne recv: from itself");
  auto work = make(Kind::kRecv, OpType::RECV, "mnemosyne:recv", tensors,
                   c10d::kUnsetTimeout);
  work->root = rank;
  work->tag = static_cast<uint64_t>(tag);
  work->agreed = agreedOn(tensors[0], 0);
  work->outputs = {work->write(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::recvAnysource(Tensors& tensors,
                                                          int tag) {
  checkTensors("recv", tensors, 1);
  TORCH_CHECK(tag >= 0, "mnemosyne recv: tag must be nonnegative, got ", tag);
  auto work = make(Kind::kRecvAny, OpType::RECVANYSOURCE,
                   "mnemosyne:recvAnySource", tensors, c10d::kUnsetTimeout);
  work->tag = static_cast<uint64_t>(tag);
  work->agreed = agreedOn(tensors[0], 0);
  work->outputs = {work->write(tensors[0])};
  work->setResult(tensors);
  return launch(std::move(work));
}

MnemosyneBackend::WorkPtr MnemosyneBackend::barrier(
    const c10d::BarrierOptions& opts) {
  return launch(make(Kind::kBarrier, OpType::BARRIER, "mnemosyne:barrier", {},
                     opts.timeout));
}

// Its failure ends only itself. Rank 0 knows who is missing.
void MnemosyneBackend::monitoredBarrier(const c10d::BarrierOptions& opts,
                                        bool wait_all_ranks) {
  auto work = make(Kind::kMonitoredBarrier, OpType::BARRIER,
                   "mnemosyne:monitored_barrier", {}, opts.timeout);
  if (opts.timeout == Milliseconds(0)) work->timeout = opts.timeout;
  const std::string time = std::to_string(work->timeout.count()) + " ms";
  launch(work);
  try {
    work->wait(kNoTimeout);
  } catch (const CollectiveTimeout& error) {
    const std::string own =
        "Rank " + std::to_string(group()->globalRank(getRank()));
    const std::string root = "rank " + std::to_string(group()->globalRank(0));
    const std::vector<int>& late = work->late_ranks;
    std::string what = own + " successfully reached monitoredBarrier, but " +
                       "received errors while waiting for send/recv from " +
                       root + "; " + root + " knows which rank is missing";
    if (getRank() == 0) {
      what = late.size() == 1 || !wait_all_ranks
                 ? "Rank " + std::to_string(late.empty() ? -1 : late[0])
                 : "Ranks " + joined(late);
      what += " failed to pass monitoredBarrier in " + time;
      if (work->timeout == Milliseconds(0))
        what = own + " timed out in monitoredBarrier after " + time;
      what += "; missing ranks: [" + joined(late) + "]";
    }
    throw CollectiveTimeout(what, error.rank(), error.epoch());
  }
}

}  // namespace mnemosyne::ccl
