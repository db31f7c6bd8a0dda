"""What a mesh does when workers die, hang, disagree, or come anew."""

import os
import select
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adversity import all_reduce, connect, counters, identity
from world import Worker, World

from mnemosyne_plugin.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    PeerLost,
    StaleEpoch,
)

SIZE = 4
# Far below every timeout: whoever waits as long was not told of the death.
PROMPT_S = 5.0


@pytest.fixture(params=["auto", "tcp"])
def fresh_world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world:
        yield world


def failing(worker: Worker, numel: int) -> tuple[str, int, int, bool]:
    """All-reduce until it fails; return the error and whether it is latched."""
    error: Any = None
    try:
        while True:
            all_reduce(worker, numel)
    except (PeerLost, StaleEpoch) as caught:
        error = caught
    latched = worker.mesh.failure()
    assert type(latched) is type(error) and latched.rank == error.rank
    readable = bool(select.select([worker.mesh.failure_fd], [], [], 0)[0])
    return type(error).__name__, error.rank, error.epoch, readable


@pytest.mark.parametrize("numel", [10, 1_000_000])
def test_a_killed_worker_is_replaced_under_the_same_groups(
    world: World, numel: int
) -> None:
    """Survivors are told at once, and replace one link each."""
    before = world.run(identity)
    for victim in (2, 0):
        survivors = [rank for rank in range(SIZE) if rank != victim]
        world.start(failing, numel, ranks=survivors)
        world.start(failing, numel, ranks=[victim])
        time_killed = time.monotonic()
        world.kill(victim)
        for name, rank, epoch, readable in world.results(survivors):
            assert (name, rank, epoch) == ("PeerLost", victim, world.epoch)
            assert readable
        assert time.monotonic() - time_killed < PROMPT_S

        world.replace(victim)
        replaced = world.seat()

        assert [replaced[rank] for rank in survivors] == [1] * (SIZE - 1)
        assert replaced[victim] == 0
        assert world.run(all_reduce, numel) == [10.0] * SIZE
        world.run(connect)
        after = world.run(identity)
        assert [after[r] for r in survivors] == [before[r] for r in survivors]
        before = after
    assert [one["links_open"] for one in world.run(counters)] == [SIZE - 1] * SIZE


def exchange(worker: Worker, peer: int) -> None:
    tensor = torch.zeros(3)
    if worker.rank < peer:
        worker.group().send([tensor], peer, 0).wait()
    else:
        worker.group().recv([tensor], peer, 0).wait()


def test_only_links_that_touched_the_dead_worker_are_replaced(
    fresh_world: World,
) -> None:
    world = fresh_world
    world.start(exchange, 3, ranks=[1])
    world.start(exchange, 1, ranks=[3])
    world.results([1, 3])
    world.kill(3)
    world.replace(3)
    assert world.seat() == [0, 1, 0, 0]
    world.start(exchange, 3, ranks=[1])
    world.start(exchange, 1, ranks=[3])
    world.results([1, 3])
    assert [one["links_open"] for one in world.run(counters)][:3] == [0, 1, 0]
    assert world.run(all_reduce) == [10.0] * SIZE


def test_a_new_epoch_without_a_death_keeps_all_links(world: World) -> None:
    before = [one["links_opened"] for one in world.run(counters)]
    for _ in range(20):
        assert world.seat() == [0] * SIZE
        assert world.run(all_reduce, 100_000) == [10.0] * SIZE
    after = [one["links_opened"] for one in world.run(counters)]
    assert after == before


def wait_alone(worker: Worker, numel: int) -> tuple[str, int]:
    """Wait for a collective that the others do not join."""
    try:
        all_reduce(worker, numel)
    except (PeerLost, StaleEpoch, CollectiveTimeout) as error:
        return type(error).__name__, error.rank
    return "nothing", -1


@pytest.mark.parametrize("numel", [10, 1_000_000])
def test_half_a_collective_is_dropped_when_the_epoch_ends(
    world: World, numel: int
) -> None:
    members = world._members
    waiting = [0, 1, 2]
    world.start(wait_alone, numel, ranks=waiting)
    # The others learn of the new epoch from rank 3's marker alone.
    world.run(seat_later, world.epoch + 1, members, ranks=[3])
    assert world.results(waiting) == [("StaleEpoch", 3)] * 3
    world.epoch += 1
    for rank in waiting:
        world.run(seat_later, world.epoch, members, ranks=[rank])
    assert world.run(all_reduce, numel) == [10.0] * SIZE


def seat_later(worker: Worker, epoch: int, members: list[Any]) -> int:
    return worker.mesh.reconfigure(epoch, worker.rank, members)


def fence_while_waiting(worker: Worker, numel: int) -> str:
    import threading

    started = threading.Event()
    caught: list[BaseException] = []

    def wait() -> None:
        started.set()
        try:
            all_reduce(worker, numel)
        except (PeerLost, StaleEpoch) as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait(5)
    worker.mesh.fence("the agent says so", 3)
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(PeerLost):
        all_reduce(worker)
    with pytest.raises(StaleEpoch):
        worker.mesh.reconfigure(worker.mesh.epoch, 0, [])
    return f"{type(caught[0]).__name__} {caught[0].rank}"  # type: ignore[attr-defined]


def test_another_thread_can_cancel_what_one_waits_for(world: World) -> None:
    assert world.run(fence_while_waiting, 1000, ranks=[0, 1]) == ["PeerLost 3"] * 2


def time_out(worker: Worker) -> tuple[str, str]:
    group = worker.group("impatient", timeout_s=0.3)
    with pytest.raises(CollectiveTimeout) as caught:
        group.barrier().wait()
    return str(caught.value), type(worker.mesh.failure()).__name__


def test_a_timeout_names_the_ranks_that_were_waited_for(world: World) -> None:
    [(text, latched)] = world.run(monitored, ranks=[0])
    assert "[1, 2, 3]" in text and latched == "NoneType"
    world.seat()
    [(text, latched)] = world.run(time_out, ranks=[2])
    assert "impatient" in text and "[1]" in text and latched == "CollectiveTimeout"
    world.seat()
    assert world.run(all_reduce) == [10.0] * SIZE


def monitored(worker: Worker) -> tuple[str, str]:
    from datetime import timedelta

    with pytest.raises(CollectiveTimeout) as caught:
        worker.group().monitored_barrier(timedelta(seconds=0.3), True)
    return str(caught.value), type(worker.mesh.failure()).__name__


def disagree(worker: Worker, what: str) -> str:
    group = worker.group()
    odd = worker.rank == 1
    tensor = torch.zeros(200_000 if what == "long" and odd else 100)
    try:
        if what == "kind" and odd:
            group.allgather([[tensor.clone() for _ in range(SIZE)]], [tensor]).wait()
        elif what == "op" and odd:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            group.allreduce([tensor], options).wait()
        else:
            group.allreduce([tensor[:99] if what == "short" and odd else tensor]).wait()
    except (CollectiveMismatch, StaleEpoch) as error:
        return type(error).__name__
    except CollectiveTimeout:
        return "timeout"
    return "nothing"


@pytest.mark.parametrize("what", ["short", "long", "kind", "op"])
def test_ranks_that_disagree_are_told_so(world: World, what: str) -> None:
    ranks = [0, 1]  # rank 2 and 3 would wait for them
    assert "CollectiveMismatch" in world.run(disagree, what, ranks=ranks)
    world.seat()
    assert world.run(all_reduce) == [10.0] * SIZE


def absorbing(worker: Worker) -> list[bool]:
    """Go on through a death as if nothing had happened."""
    worker.mesh.absorb(True)
    group = worker.group()
    while worker.mesh.failure() is None:
        group.allreduce([torch.ones(1000)]).wait()
    tensor = torch.ones(5)
    group.allreduce([tensor]).wait()
    outputs = [torch.full((3,), float("nan")) for _ in range(SIZE)]
    work = group.allgather([outputs], [torch.ones(3)])
    assert work.get_future().wait() is not None
    own = torch.full((SIZE, 2), float("nan"))
    own[worker.rank] = 7.0
    group._allgather_base(own.view(-1), own[worker.rank]).wait()
    received = torch.full((9,), float("nan"))
    group.recv([received], (worker.rank + 1) % SIZE, 0).wait()
    with pytest.raises((PeerLost, StaleEpoch)):
        worker.group("control", absorb=False).allreduce([torch.ones(1)]).wait()
    worker.mesh.absorb(False)
    with pytest.raises((PeerLost, StaleEpoch)):
        group.allreduce([tensor]).wait()
    return [
        bool((tensor == 1).all()),
        all(bool((output == 0).all()) for output in outputs),
        bool((own[worker.rank] == 7).all()) and float(own.sum()) == 14.0,
        bool((received == 0).all()),
    ]


def test_absorbed_failures_leave_finite_values(world: World) -> None:
    survivors = [0, 1, 3]
    world.start(absorbing, ranks=range(SIZE))
    world.kill(2)
    assert world.results(survivors) == [[True] * 4] * 3
    world.replace(2)
    world.seat()
    assert world.run(all_reduce) == [10.0] * SIZE


def set_up(worker: Worker, with_log: bytes | None = None) -> list[float]:
    """What a script does before its first step; the result must not depend on it."""
    mesh = worker.mesh
    if with_log is not None:
        mesh.start_replay(with_log)
    pair = create_pair(worker)
    values: list[float] = []
    for numel in (3, 100_000):
        tensor = torch.full((numel,), float(worker.rank))
        worker.group().allreduce([tensor]).wait()
        values.append(float(tensor[0]) if numel == 3 else 0.0)
        worker.group().broadcast([tensor[:2]]).wait()
    gathered = [torch.zeros(1) for _ in range(SIZE)]
    worker.group().allgather([gathered], [torch.tensor([worker.rank * 2.0])]).wait()
    values += [float(one) for one in gathered]
    if pair is not None:
        one = torch.ones(1)
        pair.allreduce([one]).wait()
        values.append(float(one))
    if worker.rank == 2:
        worker.group().send([torch.tensor([5.0])], 1, 0).wait()
    if worker.rank == 1:
        one = torch.zeros(1)
        work = worker.group().recv_anysource([one], 0)
        work.wait()
        values += [float(one), float(work._source_rank())]
    worker.group().barrier().wait()
    if with_log is not None:
        mesh.stop_replay()
    return values


def create_pair(worker: Worker) -> Any:
    from mnemosyne_plugin.ccl import create_group

    ranks = [worker.rank & ~1, worker.rank | 1]
    return create_group(worker.mesh, "pair", ranks, 10.0)


def record(worker: Worker) -> tuple[list[float], bytes]:
    worker.mesh.start_recording()
    values = set_up(worker)
    return values, worker.mesh.stop_recording()


def replay_badly(worker: Worker, log: bytes) -> None:
    for damaged in (b"x", log[:-1], log[:30], log.replace(b"pair", b"pear", 1)):
        with pytest.raises(ValueError):
            worker.mesh.start_replay(damaged)
    worker.mesh.start_replay(log)
    with pytest.raises(CollectiveMismatch):
        worker.group().barrier().wait()
    assert worker.mesh.failure() is None
    worker.mesh.stop_replay()


def test_a_newcomer_runs_the_set_up_alone(world: World) -> None:
    recorded = world.run(record)
    for victim in (1, 2):
        world.kill(victim)
        world.replace(victim)
        world.seat()
        values, log = recorded[victim]
        [replayed] = world.run(set_up, log, ranks=[victim])
        assert replayed == values
        world.run(replay_badly, log, ranks=[victim])
    assert world.run(all_reduce) == [10.0] * SIZE


def fork(worker: Worker) -> list[str]:
    """Fork as a data loader does; the child must not disturb the parent's mesh."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = []
        for action in (worker.mesh.failure, lambda: all_reduce(worker)):
            try:
                action()
            except RuntimeError as error:
                said.append(str(error)[:9])
        worker.mesh = None  # type: ignore[assignment]
        worker.kept.clear()
        os.write(writer, ",".join(said).encode())
        os.read(writer_end_of_life(), 1)
        os._exit(0)
    os.close(writer)
    worker.kept["child"] = child
    return os.read(reader, 100).decode().split(",")


def writer_end_of_life() -> int:
    """A pipe that nobody writes to: the child lives until it is killed."""
    reader, _writer = os.pipe()
    return reader


def kill_child(worker: Worker) -> None:
    os.kill(worker.kept["child"], 9)
    os.waitpid(worker.kept["child"], 0)


def test_a_forked_child_neither_uses_nor_keeps_alive_a_mesh(world: World) -> None:
    assert world.run(fork) == [["this mesh", "this mesh"]] * SIZE
    assert world.run(all_reduce, 100_000) == [10.0] * SIZE
    # The child of the victim lives on; its parent's death must be seen all the same.
    children = [pid for [pid] in world.run(child_of, ranks=[3])]
    world.start(failing, 10, ranks=[0, 1, 2])
    world.kill(3)
    for name, rank, _epoch, _readable in world.results([0, 1, 2]):
        assert (name, rank) == ("PeerLost", 3)
    os.kill(children[0], 9)
    world.run(kill_child, ranks=[0, 1, 2])


def child_of(worker: Worker) -> list[int]:
    return [worker.kept["child"]]


def leave(worker: Worker) -> None:
    worker.group().barrier().wait()
    if worker.rank == 1:
        worker.mesh.close()


def test_who_leaves_in_good_order_is_missed_only_by_those_who_need_it(
    world: World,
) -> None:
    world.run(leave)
    for pair in ((0, 2), (0, 3), (2, 3)):
        world.start(exchange, pair[1], ranks=[pair[0]])
        world.start(exchange, pair[0], ranks=[pair[1]])
        world.results(pair)
    assert world.run(needs_rank_1, ranks=[0, 2, 3]) == [1] * 3
    world.kill(1)


def needs_rank_1(worker: Worker) -> int:
    assert worker.mesh.failure() is None
    with pytest.raises(PeerLost) as caught:
        worker.group().recv([torch.zeros(1)], 1, 0).wait()
    return caught.value.rank
