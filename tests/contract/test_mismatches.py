"""Ranks that do not ask for the same: typed errors that name them, and no hang.

Rank 1 is the odd one. Two ranks both know at once; of four, those who only wait for
one of these two run into the group's time-out, which names whom they waited for.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from world import Worker, World

from mnemosyne_plugin.ccl import create_group
from mnemosyne_plugin.errors import CollectiveMismatch, CollectiveTimeout

SIZE = 4
LONG = 100_000  # beyond what is sent unasked
TIMEOUT_S = 0.5

# What a rank does with its group; True for the odd one.
Ask = Callable[[Any, bool], Any]
Said = tuple[str, int, str]
MISMATCHES: dict[str, Ask] = {}
SILENCES: dict[str, Ask] = {}
# Each waits for a message and none is sent: there is nothing to see.
UNSEEN = ("root of gather",)
AMONG_FOUR = (
    *("operation", "operation, long", "order", "order, long", "reduce op, long"),
    *("size of shares", "root of scatter", "splits"),
)


@pytest.fixture(scope="module", params=["auto", "tcp"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world:
        yield world


def options(kind: Any, **fields: Any) -> Any:
    chosen = kind()
    for name, value in fields.items():
        setattr(chosen, name, value)
    return chosen


def all_reduce(
    group: Any,
    numel: int = 10,
    dtype: torch.dtype = torch.float32,
    op: Any = dist.ReduceOp.SUM,
) -> Any:
    chosen = options(dist.AllreduceOptions, reduceOp=op)
    return group.allreduce([torch.ones(numel, dtype=dtype)], chosen)


def broadcast(group: Any, root: int = 0, numel: int = 10) -> Any:
    chosen = options(dist.BroadcastOptions, rootRank=root, rootTensor=0)
    return group.broadcast([torch.ones(numel)], chosen)


def reduce(group: Any, root: int = 0, numel: int = 10) -> Any:
    chosen = options(dist.ReduceOptions, rootRank=root)
    return group.reduce([torch.ones(numel)], chosen)


def gather(group: Any, root: int = 0, numel: int = 10) -> Any:
    own = torch.ones(numel)
    parts = [[torch.empty(numel)] * group.size()] if group.rank() == root else []
    return group.gather(parts, [own], options(dist.GatherOptions, rootRank=root))


def scatter(group: Any, root: int = 0, numel: int = 10) -> Any:
    own = torch.empty(numel)
    parts = [[torch.ones(numel)] * group.size()] if group.rank() == root else []
    return group.scatter([own], parts, options(dist.ScatterOptions, rootRank=root))


def all_gather(group: Any, numel: int = 10) -> Any:
    whole = torch.empty(numel * group.size())
    return group._allgather_base(whole, torch.ones(numel))


def reduce_scatter(group: Any, numel: int = 10, op: Any = dist.ReduceOp.SUM) -> Any:
    whole = torch.ones(numel * group.size())
    chosen = options(dist.ReduceScatterOptions, reduceOp=op)
    return group._reduce_scatter_base(torch.empty(numel), whole, chosen)


def exchange(group: Any, to_first: int = 2, from_first: int = 2) -> Any:
    sent = [to_first, *[2] * (group.size() - 1)]
    received = [from_first, *[2] * (group.size() - 1)]
    whole = torch.empty(sum(received))
    return group.alltoall_base(whole, torch.ones(sum(sent)), received, sent)


def send_and_receive(group: Any, is_odd: bool, numel: int, other: torch.Tensor) -> Any:
    if is_odd:
        return group.recv([other], 0, 5)
    return group.send([torch.ones(numel)], 1, 5)


def in_order(group: Any, is_odd: bool, numel: int) -> Any:
    first, second = (
        (all_reduce(group, numel), broadcast(group, 0, numel))
        if is_odd
        else (broadcast(group, 0, numel), all_reduce(group, numel))
    )
    first.wait()
    return second


MAX = dist.ReduceOp.MAX
SUM = dist.ReduceOp.SUM
MISMATCHES |= {
    "operation": lambda g, odd: broadcast(g) if odd else all_reduce(g),
    "operation, long": lambda g, odd: (
        all_gather(g, LONG) if odd else all_reduce(g, LONG)
    ),
    "one that only sends": lambda g, odd: reduce(g) if odd else broadcast(g),
    "two that only send": lambda g, odd: gather(g) if odd else scatter(g),
    "barrier": lambda g, odd: g.barrier() if odd else all_reduce(g),
    "barrier, long": lambda g, odd: g.barrier() if odd else all_reduce(g, LONG),
    "exchange": lambda g, odd: g.barrier() if odd else exchange(g),
    "size": lambda g, odd: all_reduce(g, 11 if odd else 10),
    "size, one long": lambda g, odd: all_reduce(g, LONG if odd else 10),
    "size of broadcast": lambda g, odd: broadcast(g, 0, LONG + odd),
    "size of reduce": lambda g, odd: reduce(g, 0, 10 + odd),
    "size of gather": lambda g, odd: gather(g, 0, 10 + odd),
    "size of scatter": lambda g, odd: scatter(g, 0, LONG + odd),
    "size of shares": lambda g, odd: all_gather(g, 10 + odd),
    "size to scatter": lambda g, odd: reduce_scatter(g, 10 + odd),
    "type": lambda g, odd: all_reduce(g, 10, torch.int32 if odd else torch.float32),
    "type, wider": lambda g, odd: all_reduce(g, 10, torch.int64 if odd else torch.int8),
    "reduce op": lambda g, odd: all_reduce(g, op=MAX if odd else SUM),
    "reduce op, long": lambda g, odd: all_reduce(g, LONG, op=MAX if odd else SUM),
    "reduce op to scatter": lambda g, odd: reduce_scatter(g, op=MAX if odd else SUM),
    "root of broadcast": lambda g, odd: broadcast(g, int(odd)),
    "root of reduce": lambda g, odd: reduce(g, int(odd), LONG),
    "root of gather": lambda g, odd: gather(g, int(odd)),
    "root of scatter": lambda g, odd: scatter(g, int(odd)),
    "splits": lambda g, odd: exchange(g, 2, 3) if odd else exchange(g),
    "order": lambda g, odd: in_order(g, odd, 10),
    "order, long": lambda g, odd: in_order(g, odd, LONG),
    "message's size": lambda g, odd: send_and_receive(g, odd, 10, torch.empty(11)),
    "message's size, long": lambda g, odd: send_and_receive(
        g, odd, LONG, torch.empty(LONG + 1)
    ),
    "message's type": lambda g, odd: send_and_receive(
        g, odd, 10, torch.empty(10, dtype=torch.int32)
    ),
    # It is found out by the next operation of who never called.
    "broadcast that one never asked for": lambda g, odd: None if odd else broadcast(g),
}
SILENCES |= {
    "all-reduce": lambda g, odd: None if odd else all_reduce(g),
    "long all-reduce": lambda g, odd: None if odd else all_reduce(g, LONG),
    "long broadcast": lambda g, odd: None if odd else broadcast(g, 0, LONG),
    "exchange": lambda g, odd: None if odd else exchange(g),
    "barrier": lambda g, odd: None if odd else g.barrier(),
    "receive": lambda g, odd: None if odd else g.recv([torch.empty(1)], 1, 0),
}


def ask(
    worker: Worker, table: str, name: str, size: int, then_meet: bool = True
) -> Said:
    """Return the error of what was asked for, or of a barrier after it."""
    worker.kept["asked"] = worker.kept.get("asked", 0) + 1
    group = create_group(
        worker.mesh, f"asked {worker.kept['asked']}", range(size), TIMEOUT_S
    )
    try:
        work = globals()[table][name](group, worker.rank == 1)
        if work is not None:
            work.wait()
        if then_meet:
            group.barrier().wait()
    except (CollectiveMismatch, CollectiveTimeout) as error:
        return type(error).__name__, getattr(error, "rank", -1), str(error)
    return "nothing", -1, ""


def total(worker: Worker) -> float:
    tensor = torch.full((1000,), float(worker.rank))
    worker.group().allreduce([tensor]).wait()
    return float(tensor[0])


def go_on(world: World) -> None:
    """The same processes, and a group that was there before."""
    world.seat()
    assert world.run(total) == [6.0] * SIZE


@pytest.mark.parametrize("name", MISMATCHES)
def test_two_that_disagree_name_each_other(world: World, name: str) -> None:
    go_on(world)

    said = world.run(ask, "MISMATCHES", name, 2, ranks=[0, 1])

    want = "CollectiveTimeout" if name in UNSEEN else "CollectiveMismatch"
    for rank, (kind, other, text) in enumerate(said):
        assert (kind, other) == (want, 1 - rank), said
        assert f"rank {rank} " in text and str(other) in text
    go_on(world)


@pytest.mark.parametrize("name", AMONG_FOUR)
def test_of_four_one_that_disagrees_is_named(world: World, name: str) -> None:
    go_on(world)

    said = world.run(ask, "MISMATCHES", name, SIZE)

    kinds = [kind for kind, _, _ in said]
    assert kinds[1] == "CollectiveMismatch", said
    assert ("CollectiveMismatch", 1) in [(kind, other) for kind, other, _ in said]
    for rank, (kind, other, text) in enumerate(said):
        assert kind in ("CollectiveMismatch", "CollectiveTimeout"), said
        assert other in range(SIZE) and other != rank, said
        assert f"rank {rank} " in text and str(other) in text, said
    go_on(world)


@pytest.mark.parametrize("name", SILENCES)
def test_one_that_never_calls_is_named(world: World, name: str) -> None:
    go_on(world)

    first, second = world.run(ask, "SILENCES", name, 2, False, ranks=[0, 1])

    assert first[:2] == ("CollectiveTimeout", 1) and "ranks [1]" in first[2]
    assert second[0] == "nothing"
    go_on(world)
