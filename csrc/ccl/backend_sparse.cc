// The sum of sparse tensors, which every rank has with other indices.
#include <c10/core/GradMode.h>

#include <cstring>
#include <utility>

#include "ccl/backend.h"
#include "ccl/backend_tensors.h"

namespace mnemosyne::ccl {
namespace {

constexpr int64_t kAlignment = 16;

// A share is the number of its elements, their indices, then their values.
class SparseSum final : public BackendWork {
 public:
  SparseSum(int rank, Tensors tensors)
      : BackendWork(rank, c10d::OpType::_ALLREDUCE_SPARSE,
                    "mnemosyne:sparse_all_reduce", tensors),
        tensors_(std::move(tensors)) {
    const c10::NoGradGuard no_grad;
    at::Tensor own = tensors_[0];
    for (size_t i = 1; i < tensors_.size(); ++i) own = own + tensors_[i];
    own = own.coalesce();
    inputs = {pack(own._indices(), own._values())};
    setResult(tensors_);
  }

 protected:
  void unstage() override {
    if (!gathered) return;  // the failure was absorbed
    const c10::NoGradGuard no_grad;
    at::Tensor sum = unpack(outputs[0]);
    for (size_t i = 1; i < outputs.size(); ++i) sum = sum + unpack(outputs[i]);
    sum = sum.coalesce().clone();
    for (at::Tensor& tensor : tensors_) tensor.copy_(sum);
  }

 private:
  Buffer pack(const at::Tensor& indices, const at::Tensor& values) {
    const Buffer index = read(indices);
    const Buffer value = read(values);
    const int64_t count = values.size(0);
    const size_t size = sizeof(count) + index.size + value.size;
    const Buffer share =
        stage((size + kAlignment - 1) / kAlignment * kAlignment);
    Packer parts(share);
    std::memcpy(parts.next(sizeof(count)).data, &count, sizeof(count));
    copyBytes(parts.next(index.size), index);
    copyBytes(parts.next(value.size), value);
    return share;
  }

  at::Tensor unpack(const Buffer& share) const {
    const at::Tensor& like = tensors_[0];
    Packer parts(share);
    int64_t count;
    std::memcpy(&count, parts.next(sizeof(count)).data, sizeof(count));
    std::vector<int64_t> value_sizes(like.sizes().begin() + like.sparse_dim(),
                                     like.sizes().end());
    value_sizes.insert(value_sizes.begin(), count);
    const Buffer index =
        parts.next(like.sparse_dim() * count * sizeof(int64_t));
    const Buffer value = parts.next(share.size - sizeof(count) - index.size);
    return at::_sparse_coo_tensor_unsafe(
        at::from_blob(index.data, {like.sparse_dim(), count}, at::kLong),
        at::from_blob(value.data, value_sizes, like.scalar_type()),
        like.sizes(), like.options(), /*is_coalesced=*/true);
  }

  Tensors tensors_;
};

void checkSparse(const Tensors& tensors, const c10d::ReduceOp& op) {
  const char* what = "all_reduce";
  TORCH_CHECK(!tensors.empty(), "mnemosyne ", what,
              ": requires non-empty tensor list");
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.is_sparse() && tensor.is_cpu(), "mnemosyne ", what,
                ": expected sparse CPU tensors (COO), got ", tensor.toString());
    checkSameType(what, tensors[0], tensor);
    checkSameShape(what, tensors[0], tensor);
    TORCH_CHECK(tensor.sparse_dim() == tensors[0].sparse_dim(), "mnemosyne ",
                what, ": tensors of different sparse dimensions");
  }
  TORCH_CHECK(op == c10d::ReduceOp::SUM, "mnemosyne ", what,
              ": sparse tensors can only be reduced with ReduceOp.SUM");
}

}  // namespace

MnemosyneBackend::WorkPtr MnemosyneBackend::allreduceSparse(
    Tensors& tensors, const c10d::AllreduceOptions& opts) {
  checkSparse(tensors, opts.reduceOp);
  auto work = c10::make_intrusive<SparseSum>(getRank(), tensors);
  work->kind = Kind::kAllGatherUnequal;
  work->group = group();
  work->type_name = c10::toString(tensors[0].scalar_type());
  work->timeout =
      opts.timeout > Milliseconds(0) ? opts.timeout : timeout_.load();
  Agreement agreed;
  agreed << tensors[0] << tensors[0].sparse_dim();
  for (const int64_t size : tensors[0].sizes()) agreed << size;
  work->agreed = agreed.hash();
  return launch(std::move(work));
}

}  // namespace mnemosyne::ccl
