"""Cases: what training is made of, on top of c10d. Values need only be close."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional as with_grad
from cases import case, values
from cases_lists import name_of
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    optimizer_overlap_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer, functional_sgd
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel as DDP


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)]
    return torch.nn.Sequential(*layers)


def train(
    wrapped: torch.nn.Module, rank: int, steps: int = 3, width: int = 16
) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        inputs = values(4 * width, rank + step).reshape(4, width)
        wrapped(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in wrapped.parameters()]


@case
def functional_collectives(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    own = values(4 * size, rank)
    pairs = [funcol.all_reduce_coalesced([own, own[:3]], "sum", pg)]
    pairs.append(funcol.all_gather_into_tensor_coalesced([own, own[:2]], pg))
    pairs.append(
        funcol.reduce_scatter_tensor_coalesced([own, own * 2], "sum", [0, 0], pg)
    )
    ones = [size - 1, 1, 1, 1][:size]
    results = [
        funcol.all_reduce(own, "sum", pg),
        funcol.broadcast(own, 1, pg),
        funcol.all_gather_tensor(own.reshape(4, size), 1, pg),
        funcol.reduce_scatter_tensor(own.reshape(4, size), "max", 1, pg),
        funcol.all_to_all_single(own, None, None, pg),
        funcol.all_to_all_single(own[: sum(ones)], [ones[rank]] * size, ones, pg),
        funcol.permute_tensor(own, [(to + 1) % size for to in range(size)], pg),
        *(tensor for pair in pairs for tensor in pair),
    ]
    return [funcol.wait_tensor(tensor).clone() for tensor in results]


@case
def functional_collectives_with_gradients(
    pg: Any, rank: int, size: int
) -> list[torch.Tensor]:
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: funcol.all_gather_tensor_autograd(t, 0, pg),
        lambda t: funcol.reduce_scatter_tensor_autograd(t, "sum", 0, pg),
        lambda t: funcol.all_to_all_single_autograd(t, None, None, pg),
        lambda t: with_grad.all_reduce(t, group=pg),
        lambda t: with_grad.broadcast(t, 1, group=pg),
        lambda t: torch.cat(with_grad.all_gather(t, group=pg)),
        lambda t: with_grad.reduce_scatter(
            torch.empty(2), list(t.chunk(size)), group=pg
        ),
        lambda t: with_grad.all_to_all_single(torch.empty_like(t), t, group=pg),
    ]
    results = []
    for call in calls:
        leaf = values(2 * size, rank).requires_grad_()
        output = call(leaf)
        (output * values(output.numel(), rank + 1)).sum().backward()
        results += [output.detach().clone(), leaf.grad]
    return results


# Torch refuses those with bfloat16 to all but NCCL.


def train_exactly(wrapped: DDP, rank: int, lr: float = 0.25) -> list[torch.Tensor]:
    """Gradients are quarters of small integers: sums of those are exact in float16."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=lr)
    for step in range(4):
        optimizer.zero_grad()
        wrapped(values(64, rank + step).reshape(4, 16)).sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in wrapped.parameters()]


def integers() -> torch.nn.Linear:
    layer = torch.nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight.copy_(values(64, 0).reshape(4, 16))
        layer.bias.fill_(1.0)
    return layer


@case
def communication_hooks(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Not bf16 and quantization: torch refuses the one to all but NCCL, and the
    other indexes the future of an all-gather as only NCCL makes it."""
    local = post_localSGD_hook.PostLocalSGDState(pg, pg, start_localSGD_iter=2)
    alone = post_localSGD_hook.PostLocalSGDState(
        pg, pg, start_localSGD_iter=2, post_local_gradient_allreduce=False
    )
    average, halves = default_hooks.allreduce_hook, default_hooks.fp16_compress_wrapper
    hooks: list[tuple[Any, Any]] = [
        (pg, average),
        (pg, default_hooks.fp16_compress_hook),
        (pg, halves(average)),
        (local, post_localSGD_hook.post_localSGD_hook),
        (alone, post_localSGD_hook.post_localSGD_hook),
        (None, debugging_hooks.noop_hook),
    ]
    results = []
    for state, hook in hooks:
        wrapped = DDP(integers(), process_group=pg)
        wrapped.register_comm_hook(state, hook)
        results += train_exactly(wrapped, rank)
    for kind in ("ALLREDUCE", "FP16_COMPRESS"):
        wrapped = DDP(integers(), process_group=pg)
        wrapped._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, kind))
        results += train_exactly(wrapped, rank)
    for want, got in zip(results[:2] * 2, results[2:6], strict=True):
        assert torch.equal(want, got)
    return results


@case
def communication_hooks_that_step(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """The callback of the last bucket changes the parameters themselves."""
    wrapped = DDP(integers(), process_group=pg, bucket_cap_mb=1e-5)
    state = optimizer_overlap_hooks._OptimizerHookState(
        functional_sgd._FunctionalSGD([], lr=0.25, _allow_empty_param_list=True)
    )
    hook = optimizer_overlap_hooks._hook_then_optimizer(
        default_hooks.allreduce_hook, state
    )
    wrapped.register_comm_hook(pg, hook)
    return train_exactly(wrapped, rank, lr=0.0)


@case
def low_rank_communication_hooks(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Not those in batches: torch's own code refuses the matrices that it makes."""
    results = []
    for matrix_rank, is_batched in ((1, False), (2, False), (2, True)):
        state = powerSGD_hook.PowerSGDState(
            pg,
            matrix_approximation_rank=matrix_rank,
            start_powerSGD_iter=2,
            batch_tensors_with_same_shape=is_batched,
        )
        wrapped = DDP(model(), process_group=pg)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        results += train(wrapped, rank, steps=5)
        assert state.compression_stats()[0] > 1
    return results


class Branches(torch.nn.Module):
    """Uses one of its halves, and not always the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = model(1), model(2)
        self.words = torch.nn.Embedding(10, 16, sparse=True)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        half = self.left if int(inputs[0, 0]) % 2 else self.right
        return half(inputs + self.words(inputs[:, 0].long() % 10))


@case
def options_of_ddp(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    unused = DDP(Branches(), process_group=pg, find_unused_parameters=True)
    static = DDP(model(), process_group=pg, static_graph=True)
    viewed = DDP(model(), process_group=pg, gradient_as_bucket_view=True)
    results = [*train(unused, rank), *train(static, rank), *train(viewed, rank)]
    results += [unused.module.seen.clone()]
    own = DDP(model(), process_group=pg)
    with own.no_sync():
        own(torch.ones(2, 16)).sum().backward()
    own(torch.full((2, 16), float(rank))).sum().backward()
    return [*results, *(p.grad for p in own.parameters())]


@case
def uneven_inputs(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    wrapped = DDP(model(), process_group=pg)
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(), torch.optim.Adam, process_group=pg, lr=0.01
    )
    with Join([wrapped, optimizer]):
        for step in range(rank + 1):
            optimizer.zero_grad()
            wrapped(values(16, step).reshape(1, 16)).sum().backward()
            optimizer.step()
    return [p.detach().clone() for p in wrapped.parameters()]


@case
def fully_sharded(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    mesh = DeviceMesh.from_group(pg, "cpu")
    wrapped = model()
    for layer in (wrapped[0], wrapped[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    train(wrapped, rank)
    norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    full = [p.full_tensor() for p in wrapped.parameters()]
    assert isinstance(norm, DTensor)
    return [*full, norm.full_tensor()]


@case
def distributed_tensors(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Every change of placement, on a mesh of two dimensions too."""
    flat = DeviceMesh.from_group(pg, "cpu")
    whole = values(48, 0).reshape(8, 6)
    results = []
    for source in (Shard(0), Shard(1), Replicate()):
        tensor = distribute_tensor(whole, flat, [source])
        for target in (Shard(0), Shard(1), Replicate()):
            results.append(tensor.redistribute(flat, [target]).full_tensor())
    partial = DTensor.from_local(whole * rank, flat, [Partial()])
    for target in (Shard(0), Replicate()):
        results.append(partial.redistribute(flat, [target]).full_tensor())
    left = distribute_tensor(whole, flat, [Shard(1)])
    results.append((left @ left.t()).full_tensor())

    backend = name_of(pg)
    grid = torch.arange(size).reshape(2, size // 2)
    rows, _ = dist.new_subgroups_by_enumeration(grid.tolist(), backend=backend)
    columns, _ = dist.new_subgroups_by_enumeration(grid.t().tolist(), backend=backend)
    mesh = DeviceMesh.from_group(
        [columns, rows], "cpu", mesh=grid, mesh_dim_names=("data", "tensor")
    )
    both = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
    results.append(both.full_tensor())
    results.append((both * 2).redistribute(mesh, [Replicate(), Shard(0)]).full_tensor())
    results.append(both.sum().full_tensor())
    return results


@case
def checkpoints(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0, group=pg)
    mesh = DeviceMesh.from_group(pg, "cpu")
    whole = values(40, 0).reshape(8, 5)
    saved = {
        "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
        "same": whole.clone(),
        "step": 7,
    }
    dcp.save(saved, checkpoint_id=folder[0], process_group=pg)
    loaded = {
        "sharded": distribute_tensor(torch.zeros(8, 5), mesh, [Shard(1)]),
        "same": torch.zeros(8, 5),
        "step": 0,
    }
    dcp.load(loaded, checkpoint_id=folder[0], process_group=pg)
    assert loaded["step"] == 7
    future = dcp.async_save(saved, checkpoint_id=f"{folder[0]}/2", process_group=pg)
    future.result(timeout=30)
    again = {"same": torch.zeros(8, 5)}
    dcp.load(again, checkpoint_id=f"{folder[0]}/2", process_group=pg)
    sharded = loaded["sharded"]
    assert isinstance(sharded, DTensor) and isinstance(loaded["same"], torch.Tensor)
    return [sharded.full_tensor(), loaded["same"], again["same"]]
