"""What is known of operations, how long they may take, and what threads, memory and
split groups do to them."""

import resource
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from world import Worker, World

from mnemosyne_plugin.errors import CollectiveTimeout, GroupAborted, StaleEpoch

SIZE = 2
NUM_LONG = 6_000_000  # 72 MB: beyond what a heap of malloc has reserved, 64 MB
TINY = 2.0**-149  # the least float32


@pytest.fixture(scope="module", params=["auto", "tcp"])
def shared(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world:
        yield world


@pytest.fixture
def world(shared: World) -> World:
    shared.seat()
    assert shared.run(total) == [3.0, 3.0]
    return shared


def total(worker: Worker, numel: int = 10) -> float:
    tensor = torch.full((numel,), worker.rank + 1.0)
    worker.group().allreduce([tensor]).wait()
    return float(tensor[0])


# ---------------------------------------------------------------- records


def record(worker: Worker) -> None:
    began = time.time()
    before = len(worker.mesh.finished())
    group = worker.group("recorded", timeout_s=0.3)
    group.allreduce([torch.ones(10, dtype=torch.int64)]).wait()
    whole, shares = torch.ones(8, dtype=torch.bfloat16), [torch.ones(4)] * SIZE
    group.broadcast([whole], dist.BroadcastOptions()).wait()
    group.allgather([shares], [torch.ones(4)]).wait()
    with pytest.raises(CollectiveTimeout) as caught:
        group.recv([torch.ones(3)], 1 - worker.rank, 7).wait()
    ended = time.time()

    seen = worker.mesh.finished()[before:]

    assert [
        (one.kind, one.sequence, one.num_bytes, one.dtype, one.outcome) for one in seen
    ] == [
        ("all-reduce", 0, 80, "Long", "completed"),
        ("broadcast", 1, 16, "BFloat16", "completed"),
        ("all-gather", 2, 32, "Float", "completed"),
        ("receive", 0, 12, "Float", "failed"),
    ]
    assert {one.group for one in seen} == {"recorded"}
    assert [one.error for one in seen] == ["", "", "", str(caught.value)]
    times = [time_s for one in seen for time_s in (one.began_at, one.ended_at)]
    assert times == sorted(times)
    assert began - 0.1 < times[0] and times[-1] < ended + 0.1


def test_what_has_ended_is_recorded(world: World) -> None:
    world.run(record)


def begin_and_abort(worker: Worker) -> None:
    group = worker.group("absorbed")
    worker.mesh.absorb(True)
    tensor = torch.ones(5)
    work = group.allreduce([tensor])
    assert [one.dtype for one in worker.mesh.pending()] == ["Float"]
    other = threading.Thread(target=group.abort)
    other.start()
    other.join()
    work.wait()  # as if nothing had happened
    assert bool((tensor == 1).all())
    failure = worker.mesh.failure()
    assert isinstance(failure, StaleEpoch) and "absorbed was aborted" in str(failure)
    [*_, last] = worker.mesh.finished()
    assert last.outcome == "absorbed" and last.error == str(failure)
    worker.mesh.absorb(False)
    with pytest.raises(StaleEpoch):
        group.barrier().wait()


def use_absorbed(worker: Worker) -> None:
    worker.group("absorbed").barrier().wait()


def test_an_abort_within_a_step_is_a_failure_that_the_step_absorbs(
    world: World,
) -> None:
    """The step is to be redone, in the next epoch and with this very group."""
    world.run(begin_and_abort, ranks=[0])

    world.seat()

    world.run(use_absorbed)


# ---------------------------------------------------------------- time-outs, splits


def make_groups(worker: Worker, store: str) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, worker.size),
        rank=worker.rank,
        world_size=worker.size,
        timeout=timedelta(seconds=10),
    )
    for backend in ("gloo", "mnemosyne"):
        worker.kept[backend] = dist.new_group(backend=backend)
        dist.barrier(worker.kept[backend])


def reduce_alone(worker: Worker, name: str) -> str:
    group = worker.kept[name]
    c10d._set_pg_timeout(timedelta(milliseconds=300), group)
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(1), group=group)
    return str(caught.value)


def test_a_timeout_that_is_set_later_holds_as_it_does_with_gloo(
    world: World, tmp_path: Path
) -> None:
    world.run(make_groups, str(tmp_path / "store"))
    for name in ("gloo", "mnemosyne"):
        [text] = world.run(reduce_alone, name, ranks=[0])
        assert "imed out waiting" in text and "300ms" in text


def split(worker: Worker) -> None:
    """Twice the same ranks, then one alone: no two of these are the same group."""
    parent = worker.kept["mnemosyne"]
    time = timedelta(seconds=5)
    first = parent.split_group([0, 1], timeout=time)
    second = parent.split_group([0, 1], timeout=time)
    alone = parent.split_group([1], timeout=time)
    works = [
        group.allreduce([torch.full((3,), n + 1.0)])
        for n, group in enumerate((first, second))
    ]
    sums = [float(work.result()[0][0]) for work in works if work.wait()]
    assert sums == [2.0, 4.0]
    assert (first.rank(), first.size()) == (worker.rank, SIZE)
    assert (alone is None) == (worker.rank == 0)
    if alone is not None:
        assert alone.size() == 1
        alone.allreduce([torch.ones(1)]).wait()
    if worker.rank == 0:
        first.abort()
    with pytest.raises(GroupAborted):
        first.barrier().wait()
    second.barrier().wait()
    dist.barrier(parent)


def test_parts_of_a_group_are_groups_of_their_own(world: World, tmp_path: Path) -> None:
    world.run(make_groups, str(tmp_path / "store"))
    world.run(split)


# ---------------------------------------------------------------- threads, memory


def sum_the_least(worker: Worker) -> list[torch.Tensor]:
    flushes = worker.rank == 0
    tensors = [
        torch.full((numel,), TINY * 2**20).to(dtype)
        for numel in (3, 1000, 100_000)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    least = torch.tensor([TINY])
    assert torch.set_flush_denormal(flushes)
    try:
        for tensor in tensors:
            worker.group().allreduce([tensor]).wait()
        assert bool((least * 2 == 0).all()) == flushes  # it is the user's, as before
    finally:
        torch.set_flush_denormal(False)
    return tensors


def test_how_a_thread_treats_denormals_changes_no_sum(world: World) -> None:
    """Whichever thread turns the engine adds; else ranks would get other bits."""
    for tensors in world.run(sum_the_least):
        for tensor in tensors:
            assert bool((tensor == TINY * 2**21).all())


def sum_without_memory(worker: Worker, short: int) -> str:
    """Shares of a sparse sum are collected in memory of the operation's own."""
    numel = NUM_LONG if worker.rank else 1
    indices = torch.arange(numel).reshape(1, -1)
    tensor = torch.sparse_coo_tensor(
        indices, torch.ones(numel), (NUM_LONG,), is_coalesced=True
    )
    worker.group().barrier().wait()  # to make these tensors takes a while
    timeout_s = 1.0 if short >= 0 else 20.0
    group = worker.group(f"without memory {short}", timeout_s=timeout_s)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if worker.rank == short:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limits[1]))
    try:
        group.allreduce([tensor]).wait()
    except (MemoryError, CollectiveTimeout) as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return "nothing"


def test_memory_that_is_short_is_an_error_of_the_one_that_waits(world: World) -> None:
    if world.transport == "tcp":
        pytest.skip("it has nothing to do with the transport, and takes its time")
    first, second = world.run(sum_without_memory, 0)
    assert first == "MemoryError" and second == "CollectiveTimeout"
    world.seat()
    assert world.run(sum_without_memory, -1) == ["nothing"] * SIZE
    assert world.run(total, 100_000) == [3.0, 3.0]
