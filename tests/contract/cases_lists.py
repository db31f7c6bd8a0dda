"""Cases: data types, reductions, layouts, lists of tensors, objects, sub-groups."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from cases import case, values

MOVED = (
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
COMPLEX = (torch.complex64, torch.complex128)
INTEGERS = (torch.uint8, torch.int8, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
R = dist.ReduceOp


def name_of(pg: Any) -> str:
    return str(pg._get_backend(torch.device("cpu")).name())


def reductions() -> Iterator[tuple[Any, torch.dtype]]:
    for op in (R.SUM, R.PRODUCT, R.MIN, R.MAX):
        for dtype in (*INTEGERS, *FLOATS):
            yield op, dtype
    for op in (R.BAND, R.BOR, R.BXOR):
        for dtype in INTEGERS:
            yield op, dtype
    for dtype in FLOATS:
        yield R.AVG, dtype


@case
def every_type_is_moved(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for dtype in MOVED:
        own = values(5, rank, dtype)
        rows = [values(5, 7 * rank + to, dtype) for to in range(size)]
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.gather(own, parts if rank == 1 else None, 1, group=pg)
        share = torch.empty_like(own)
        dist.scatter(share, rows if rank == 2 else None, 2, group=pg)
        swapped = torch.empty(5 * size, dtype=dtype)
        dist.all_to_all_single(swapped, torch.cat(rows), group=pg)
        passed = values(5, rank, dtype)
        works = [
            dist.isend(own, (rank + 1) % size, pg),
            dist.irecv(passed, (rank - 1) % size, pg),
        ]
        for work in works:
            work.wait()
        results += [share, swapped, passed, *(parts if rank == 1 else [])]
    for dtype in COMPLEX:  # gloo takes them in these two
        own = torch.complex(values(5, rank), values(5, rank + 1)).to(dtype)
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(parts, own, group=pg)
        dist.broadcast(own, 1, group=pg)
        results += [own, *parts]
    return results


@case
def every_reduction(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for op, dtype in reductions():
        own = 1 + values(11 * size, rank, dtype) % 3
        everywhere = own.clone()
        dist.all_reduce(everywhere, op, group=pg)
        share = torch.empty(11, dtype=dtype)
        dist.reduce_scatter_tensor(share, own, op, group=pg)
        at_root = own.clone()
        dist.reduce(at_root, 1, op, group=pg)
        results += [everywhere, share, *([at_root] if rank == 1 else [])]
    for dtype in COMPLEX:
        tensor = torch.complex(values(5, rank), values(5, rank + 1)).to(dtype)
        dist.all_reduce(tensor, group=pg)
        results.append(tensor)
    return results


@case
def several_tensors_per_rank(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    backend = pg._get_backend(torch.device("cpu"))
    summed = [values(9, rank), values(9, rank + 5)]
    backend.allreduce(summed, dist.AllreduceOptions()).wait()
    sent = [values(9, rank), values(9, 10 + rank)]
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 1, 1
    backend.broadcast(sent, options).wait()
    lists = [[torch.empty(4) for _ in range(2 * size)] for _ in range(2)]
    backend.allgather(lists, [values(4, rank), values(4, 20 + rank)]).wait()
    return [*summed, *sent, *lists[0], *lists[1]]


@case
def layouts(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Views with an offset and gaps, scalars, nothing, permuted and conjugate."""
    base = values(60, rank).reshape(6, 10)
    view = base[1:5, ::2]
    scalar = torch.tensor(float(rank))
    dist.all_reduce(scalar, group=pg)
    sent = view.clone().contiguous()
    dist.broadcast(sent, 1, group=pg)
    outputs = [torch.empty(4, 5) for _ in range(size)]
    dist.all_gather(outputs, view, group=pg)
    gaps = [torch.zeros(4, 10)[:, ::2] for _ in range(size)]
    dist.all_gather(gaps, view.contiguous(), group=pg)
    permuted = values(24, rank).reshape(1, 2, 3, 4)
    permuted = permuted.contiguous(memory_format=torch.channels_last)
    dist.all_reduce(permuted, group=pg)
    turned = torch.complex(values(3, rank), values(3, rank + 1)).conj()
    whole = [torch.empty(3, dtype=torch.complex64) for _ in range(size)]
    dist.all_gather(whole, turned.resolve_conj(), group=pg)
    leaf = values(3, rank).requires_grad_()
    with torch.no_grad():
        dist.all_reduce(leaf, group=pg)
    results = [scalar, sent, *outputs, *gaps, permuted, *whole, leaf.detach()]
    return [tensor.contiguous() for tensor in results]


@case
def nothing_at_all(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    none = torch.empty(0, 3)
    dist.all_reduce(none, group=pg)
    dist.reduce(none, 1, group=pg)
    dist.broadcast(none, 1, group=pg)
    dist.all_gather([torch.empty(0, 3) for _ in range(size)], none, group=pg)
    dist.all_gather_into_tensor(none, torch.empty(0, 3), group=pg)
    dist.reduce_scatter_tensor(none, torch.empty(0, 3), group=pg)
    dist.all_to_all_single(none, torch.empty(0, 3), group=pg)
    inputs = [torch.empty(0) for _ in range(size)]
    dist.gather(inputs[0], inputs if rank == 0 else None, 0, group=pg)
    dist.scatter(torch.empty(0), inputs if rank == 0 else None, 0, group=pg)
    pg.allreduce_coalesced([torch.empty(0), values(3, rank)]).wait()
    return [none]


@case
def sparse_sums(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    def sparse(shape: tuple[int, ...], count: int) -> torch.Tensor:
        rows = (torch.arange(count) * 3 + rank) % shape[0]
        numbers = torch.ones(count, *shape[1:]) * (rank + 1)
        return torch.sparse_coo_tensor(rows.unsqueeze(0), numbers, shape)

    tensors = [
        sparse((10,), 3),
        sparse((10,), 12),  # not coalesced
        sparse((7, 5), rank),  # hybrid; one rank has nothing
        sparse((1000, 64), 200 * rank),
        torch.eye(4).to_sparse() * rank,
    ]
    for tensor in tensors:
        dist.all_reduce(tensor, group=pg)
    work = dist.all_reduce(sparse((9,), 2 + rank), group=pg, async_op=True)
    work.wait()
    tensors += work.get_future().value()
    pair = [sparse((6,), 2), sparse((6,), 4)]
    pg._get_backend(torch.device("cpu")).allreduce(pair).wait()
    return [tensor.to_dense() for tensor in [*tensors, *pair]]


@case
def uneven_rows(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Rank r sends `to` rows to rank `to`: nothing to rank 0."""
    inputs = [values(50, rank + to) for to in range(size)]
    outputs = [torch.empty(50) for _ in range(size)]
    dist.all_to_all(outputs, inputs, group=pg)
    rows = [values(3 * to, rank).reshape(-1, 3) for to in range(size)]
    received = torch.empty(rank * size, 3)
    dist.all_to_all_single(
        received, torch.cat(rows), [rank] * size, list(range(size)), group=pg
    )
    return [*outputs, received]


@case
def lists_of_mixed_types(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    inputs = [values(5, rank), values(70_000, rank, torch.int32), values(0, rank)]
    lists = [[torch.empty_like(t) for t in inputs] for _ in range(size)]
    pg.allgather_coalesced(lists, inputs).wait()
    flat = [t.new_empty(size * t.numel()) for t in inputs]
    pg.allgather_into_tensor_coalesced(flat, inputs).wait()
    whole = [values(size * 4, rank), values(size * 40_000, rank, torch.int64)]
    shares = [t.new_empty(t.numel() // size) for t in whole]
    pg.reduce_scatter_tensor_coalesced(shares, whole).wait()
    return [*flat, *shares, *(t for one in lists for t in one)]


@case
def coalescing(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    summed = [values(numel, rank) for numel in (4, 50_000)]
    with dist._coalescing_manager(pg):
        for tensor in summed:
            dist.all_reduce(tensor, group=pg)
    inputs = [values(numel, rank) for numel in (4, 50_000)]
    wholes = [torch.empty(size * t.numel()) for t in inputs]
    with dist._coalescing_manager(pg, async_ops=True) as manager:
        for output, tensor in zip(wholes, inputs, strict=True):
            dist.all_gather_into_tensor(output, tensor, group=pg)
    manager.wait()
    shares = [torch.empty(t.numel()) for t in inputs]
    with dist._coalescing_manager(pg, async_ops=True) as manager:
        for output, tensor in zip(shares, wholes, strict=True):
            dist.reduce_scatter_tensor(output, tensor, group=pg)
    manager.wait()
    return [*summed, *wholes, *shares]


@case
def a_barrier_waits_for_what_was_begun(
    pg: Any, rank: int, size: int
) -> list[torch.Tensor]:
    tensors = [values(100_000, rank + n) for n in range(8)]
    works = [dist.all_reduce(t, group=pg, async_op=True) for t in tensors]
    dist.barrier(group=pg)
    assert all(work.is_completed() for work in works)
    return tensors


@case
def every_kind_of_object_list(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    own = {"rank": rank, "tensor": torch.full((rank,), 1.0), "text": "x" * 999}
    gathered: list[Any] = [None] * size
    dist.gather_object(own, gathered if rank == 1 else None, 1, group=pg)
    if rank == 1:
        assert [one["rank"] for one in gathered] == list(range(size))
        assert gathered[3]["tensor"].numel() == 3
    received: list[Any] = [None]
    sent = [{"to": to} for to in range(size)] if rank == 2 else [None] * size
    dist.scatter_object_list(received, sent, 2, group=pg)
    assert received == [{"to": rank}]
    listed = [own, "two", 3] if rank == 0 else [None] * 3
    dist.broadcast_object_list(listed, 0, group=pg, device=torch.device("cpu"))
    assert listed[0]["rank"] == 0 and listed[1:] == ["two", 3]
    if rank == 0:
        dist.send_object_list([own, "bye"], 3, group=pg)
    elif rank == 3:
        pair: list[Any] = [None, None]
        assert dist.recv_object_list(pair, 0, group=pg) == 0
        assert pair[0]["rank"] == 0 and pair[1] == "bye"
    return []


@case
def sub_groups(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """In any order of ranks, of one rank, and those that a rank is not in."""
    backend = name_of(pg)
    results = []
    for ranks in ([1, 3], [3, 0, 2], [2], list(range(size))):
        group = dist.new_group(ranks, backend=backend)
        tensor = values(1000, rank)
        if rank not in ranks:
            assert group is dist.GroupMember.NON_GROUP_MEMBER
            assert dist.get_rank(group) == -1
            continue
        assert dist.get_rank(group) == sorted(ranks).index(rank)
        dist.all_reduce(tensor, group=group)
        dist.broadcast(tensor, ranks[-1], group=group)
        parts = [torch.empty(3) for _ in ranks]
        dist.all_gather(parts, values(3, rank), group=group)
        dist.barrier(group=group)
        results += [tensor, *parts]
        dist.destroy_process_group(group)
    group, _ = dist.new_subgroups(2, backend=backend)
    pair, _ = dist.new_subgroups_by_enumeration([[0, 3], [2, 1]], backend=backend)
    for each in (group, pair):
        tensor = values(10, rank)
        dist.all_reduce(tensor, group=each)
        results.append(tensor)
        dist.destroy_process_group(each)
    return results


@case
def values_of_futures(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    own = values(6, rank)
    parts = [torch.empty(6) for _ in range(size)]
    whole = torch.empty(6 * size)
    works = [
        dist.all_reduce(own.clone(), group=pg, async_op=True),
        dist.broadcast(own.clone(), 1, group=pg, async_op=True),
        dist.all_gather(parts, own, group=pg, async_op=True),
        dist.all_to_all_single(whole, torch.cat([own] * size), group=pg, async_op=True),
        dist.barrier(group=pg, async_op=True),
    ]
    results: list[torch.Tensor] = []
    for work in works:
        assert work is not None
        work.wait()
        results += work.get_future().wait()
        assert work.is_success() and work.exception() is None
        results += work.result()
    return results


@case
def sums_of_any_halves(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """The order decides about the last bit, and is each implementation's own.

    Against the exact sum: ``size`` - 1 additions, each rounded by half a last bit at
    most.
    """
    for dtype in (torch.float16, torch.bfloat16):
        for numel in (700, 100_003):
            shares = [
                torch.randn(numel, generator=torch.Generator().manual_seed(r)).to(dtype)
                for r in range(size)
            ]
            tensor = shares[rank].clone()
            dist.all_reduce(tensor, group=pg)
            exact = torch.stack(shares).double().sum(0)
            reach = torch.stack(shares).double().abs().sum(0)
            bound = (size - 1) * torch.finfo(dtype).eps / 2 * reach
            assert bool(((tensor.double() - exact).abs() <= bound).all())
    return []
