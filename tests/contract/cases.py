"""What a backend is asked to do; each case returns tensors that must not differ.

Values are small integers, so that sums are exact in every type and order.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

Case = Callable[[Any, int, int], list[torch.Tensor]]
CASES: dict[str, Case] = {}

SIZES = (0, 1, 7, 4099, 200_003)
REDUCED = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
)
OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def values(size: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = (torch.arange(size) * 7 + rank * 3) % 11
    return numbers.to(dtype)


def sizes(size: int) -> Iterator[tuple[int, torch.dtype]]:
    for dtype in REDUCED:
        yield size, dtype
    for other in SIZES:
        yield other, torch.float32


@case
def all_reduce(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for dtype in REDUCED:
        for op in OPS.values():
            for numel in (5, 30_001):
                tensor = values(numel, rank, dtype)
                dist.all_reduce(tensor, op, group=pg)
                results.append(tensor)
    for numel in SIZES:
        tensor = values(numel, rank)
        dist.all_reduce(tensor, group=pg)
        results.append(tensor)
    return results


@case
def all_reduce_product(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for dtype in (torch.float32, torch.int32, torch.int64):
        tensor = values(101, rank, dtype)
        dist.all_reduce(tensor, dist.ReduceOp.PRODUCT, group=pg)
        results.append(tensor)
    return results


@case
def all_reduce_bits(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        for dtype in (torch.int32, torch.int64, torch.uint8):
            tensor = values(1001, rank, dtype)
            dist.all_reduce(tensor, op, group=pg)
            results.append(tensor)
    return results


@case
def all_reduce_async(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    tensors = [values(10_000 + n, rank + n) for n in range(20)]
    works = [dist.all_reduce(t, group=pg, async_op=True) for t in tensors]
    for work in reversed(works):
        work.wait()
        assert work.is_completed()
    return tensors


@case
def all_reduce_strided(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    tensor = values(600, rank).reshape(20, 30).t()
    whole = tensor.clone()
    dist.all_reduce(whole, group=pg)
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=pg)
    return [whole.contiguous(), tensor]


@case
def all_reduce_coalesced(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    tensors = [values(numel, rank) for numel in (3, 70_000, 1)]
    pg.allreduce_coalesced(tensors).wait()
    return tensors


@case
def reduce(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for root in range(size):
        for numel in (*SIZES, 300_000):
            tensor = values(numel, rank)
            dist.reduce(tensor, root, group=pg)
            if rank == root:
                results.append(tensor)
    return results


@case
def broadcast(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for root in range(size):
        for numel, dtype in sizes(1234):
            tensor = values(numel, rank, dtype)
            dist.broadcast(tensor, root, group=pg)
            results.append(tensor)
    return results


@case
def all_gather(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for numel, dtype in sizes(999):
        tensor = values(numel, rank, dtype)
        outputs = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(outputs, tensor, group=pg)
        results += outputs
    return results


@case
def all_gather_into_tensor(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for numel in SIZES:
        tensor = values(numel, rank)
        output = torch.empty(size * numel)
        dist.all_gather_into_tensor(output, tensor, group=pg)
        # The input may be a part of the output.
        own = torch.zeros(size, numel)
        own[rank] = tensor
        dist.all_gather_into_tensor(own.view(-1), own[rank], group=pg)
        results += [output, own]
    return results


@case
def all_gather_coalesced(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    inputs = [values(numel, rank) for numel in (5, 40_000)]
    lists = [[torch.empty_like(t) for t in inputs] for _ in range(size)]
    pg.allgather_coalesced(lists, inputs).wait()
    flat = [torch.empty(size * t.numel()) for t in inputs]
    pg.allgather_into_tensor_coalesced(flat, inputs).wait()
    return [*flat, *(t for one in lists for t in one)]


@case
def gather(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for root in (0, size - 1):
        for numel in SIZES:
            tensor = values(numel, rank)
            outputs = [torch.empty_like(tensor) for _ in range(size)]
            dist.gather(tensor, outputs if rank == root else None, root, group=pg)
            if rank == root:
                results += outputs
    return results


@case
def scatter(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for root in (0, size - 1):
        for numel in SIZES:
            inputs = [values(numel, root + to) for to in range(size)]
            output = torch.empty(numel)
            dist.scatter(output, inputs if rank == root else None, root, group=pg)
            results.append(output)
    return results


@case
def reduce_scatter(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for numel in SIZES:
        inputs = [values(numel, rank + to) for to in range(size)]
        output = torch.empty(numel)
        dist.reduce_scatter(output, inputs, group=pg)
        flat = torch.cat(inputs)
        whole = torch.empty(numel)
        dist.reduce_scatter_tensor(whole, flat, group=pg)
        results += [output, whole]
    return results


@case
def reduce_scatter_coalesced(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    inputs = [values(numel * size, rank) for numel in (3, 30_000)]
    outputs = [torch.empty(numel) for numel in (3, 30_000)]
    pg.reduce_scatter_tensor_coalesced(outputs, inputs).wait()
    return outputs


@case
def all_to_all(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for numel in SIZES:
        output = torch.empty(size * numel)
        dist.all_to_all_single(output, values(size * numel, rank), group=pg)
        results.append(output)
    # Rank r sends (r + to) rows to rank `to`, and so receives as many.
    counts = [rank + to for to in range(size)]
    uneven = values(3 * sum(counts), rank).reshape(-1, 3)
    output = torch.empty_like(uneven)
    dist.all_to_all_single(output, uneven, counts, counts, group=pg)
    return [*results, output]


@case
def point_to_point(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    results = []
    for numel in SIZES:
        tensor = values(numel, rank)
        received = torch.empty(numel)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, (rank + 1) % size, pg),
                dist.P2POp(dist.irecv, received, (rank - 1) % size, pg),
            ]
        )
        for work in works:
            work.wait()
        results.append(received)
    return results


@case
def tags(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Messages of one tag keep their order; tags do not wait for each other."""
    if rank == 0:
        long = [(values(50_000, 10 * tag + n), tag) for tag in (1, 2) for n in range(5)]
        short = [(values(9, tag), tag) for tag in (4, 3)]
        works = [pg.send([tensor], 1, tag) for tensor, tag in long + short]
        for work in works:
            work.wait()
        return []
    if rank != 1:
        return []
    received = [torch.empty(9) for _ in range(2)]
    for tensor, tag in zip(received, (3, 4), strict=True):
        pg.recv([tensor], 0, tag).wait()
    for tag in (2, 1):
        for _ in range(5):
            received.append(torch.empty(50_000))
            pg.recv([received[-1]], 0, tag).wait()
    return received


@case
def receive_from_any(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Long and short messages; the sum does not depend on who came first."""
    results = []
    for numel in (3, 60_000):
        total = torch.zeros(numel)
        sources = set()
        for _ in range(size - 1 if rank == 0 else 0):
            tensor = torch.empty(numel)
            source = dist.recv(tensor, group=pg)
            assert torch.equal(tensor, values(numel, source))
            sources.add(source)
            total += tensor
        if rank != 0:
            dist.send(values(numel, rank), 0, group=pg)
        assert len(sources) == (size - 1 if rank == 0 else 0)
        results.append(total)
        dist.barrier(group=pg)
    return results


@case
def barriers(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    dist.barrier(group=pg)
    # dist.monitored_barrier refuses all backends but gloo by name.
    pg.monitored_barrier(timedelta(seconds=30), wait_all_ranks=True)
    return []


@case
def objects(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank}, group=pg)
    assert [one["rank"] for one in gathered] == list(range(size))
    sent = [{"from": 1}, 7] if rank == 1 else [None, None]
    dist.broadcast_object_list(sent, src=1, group=pg)
    assert sent == [{"from": 1}, 7]
    return []


@case
def futures(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """A callback may itself start a collective and wait for it."""
    work = dist.all_reduce(values(100, rank), group=pg, async_op=True)

    def again(future: Any) -> torch.Tensor:
        tensor = future.value()[0].clone()
        dist.all_reduce(tensor, group=pg)
        return tensor

    return [work.get_future().then(again).wait()]


@case
def ddp(pg: Any, rank: int, size: int) -> list[torch.Tensor]:
    """Several small buckets; a communication hook that chains futures."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64) for _ in range(6)]
    model = DistributedDataParallel(
        torch.nn.Sequential(*layers), process_group=pg, bucket_cap_mb=0.02
    )

    def mean(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        work = dist.all_reduce(bucket.buffer(), group=pg, async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / size)

    model.register_comm_hook(None, mean)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(values(64, rank + step).reshape(1, 64)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
