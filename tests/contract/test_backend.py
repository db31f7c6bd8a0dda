"""One suite, several implementations: gloo is the oracle, we are the candidate."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import cases_lists  # noqa: F401 - it adds to CASES
import cases_training  # noqa: F401 - so does this
import pytest
import torch
import torch.distributed as dist
from cases import CASES, values
from world import Worker, World

from mnemosyne_plugin.errors import CollectiveTimeout

TRANSPORTS = ("auto", "tcp")
SIZE = 4


@pytest.fixture(scope="module", params=TRANSPORTS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world, tempfile.TemporaryDirectory() as folder:
        world.run(make_groups, str(Path(folder) / "store"))
        yield world


@pytest.fixture(scope="module", params=["at work", "in the set-up"])
def devices(request: pytest.FixtureRequest) -> Iterator[World]:
    """Groups of tensors on devices; small ones go over the mesh in the set-up."""
    with World(SIZE, "device") as world, tempfile.TemporaryDirectory() as folder:
        world.run(make_groups, str(Path(folder) / "store"))
        if request.param == "in the set-up":
            world.run(start_recording)
        yield world


def start_recording(worker: Worker) -> None:
    worker.mesh.start_recording()


def make_groups(worker: Worker, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, worker.size),
        rank=worker.rank,
        world_size=worker.size,
        timeout=timedelta(seconds=30),
    )
    worker.kept["gloo"] = dist.group.WORLD
    worker.kept["mnemosyne"] = dist.new_group(backend="mnemosyne")


def compare(worker: Worker, name: str) -> None:
    case = CASES[name]
    want = case(worker.kept["gloo"], worker.rank, worker.size)
    got = case(worker.kept["mnemosyne"], worker.rank, worker.size)
    assert len(want) == len(got)
    for number, (one, other) in enumerate(zip(want, got, strict=True)):
        if name == "ddp" or case.__module__ == "cases_training":
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other), f"tensor {number}"


@pytest.mark.parametrize("name", CASES)
def test_a_collective_gives_what_gloo_gives(world: World, name: str) -> None:
    world.run(compare, name)


@pytest.mark.parametrize("name", [name for name in CASES if "from_any" not in name])
def test_a_collective_on_devices_gives_what_gloo_gives(
    devices: World, name: str
) -> None:
    devices.run(compare, name)


def counters(worker: Worker) -> dict[str, int]:
    return worker.mesh.counters()


def test_links_are_of_the_kind_that_was_asked_for(world: World) -> None:
    for one in world.run(counters):
        assert one["links_open"] == SIZE - 1
        assert one["links_shm"] == (SIZE - 1 if world.transport == "auto" else 0)
        assert one["handshakes_refused"] == one["failures"] == 0


def beyond_gloo(worker: Worker) -> None:
    """What gloo does not take: more types, averages, strides, shares of any size."""
    pg, rank, size = worker.kept["mnemosyne"], worker.rank, worker.size
    for dtype in (torch.bool, torch.int16, torch.complex64, torch.complex128):
        tensor = values(1000, rank, dtype)
        outputs = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(outputs, tensor, group=pg)
        for source, output in enumerate(outputs):
            assert torch.equal(output, values(1000, source, dtype))
        dist.all_reduce(tensor, group=pg)
        shares = [values(1000, source, dtype) for source in range(size)]
        want = torch.stack(shares)
        want = want.any(0) if dtype == torch.bool else want.sum(0).to(dtype)
        assert torch.equal(tensor, want)
    for numel in (10, 100_000):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
            tensor = torch.full((numel,), 2.0 * rank, dtype=dtype)
            dist.all_reduce(tensor, dist.ReduceOp.AVG, group=pg)
            assert torch.equal(tensor, torch.full((numel,), 3.0, dtype=dtype))
        whole = torch.full((numel * size,), 2.0 * rank)
        own = whole[rank * numel : (rank + 1) * numel]
        dist.reduce_scatter_tensor(own, whole, dist.ReduceOp.AVG, group=pg)
        assert torch.equal(own, torch.full((numel,), 3.0))

    strided = values(600, rank).reshape(20, 30).t()
    dist.all_reduce(strided, group=pg)
    want = sum(values(600, source) for source in range(size)).reshape(20, 30).t()
    assert torch.equal(strided, want)
    columns = torch.zeros(7, 2 * size)
    dist.all_gather([columns[:, n] for n in range(size)], columns[:, 0] + rank, pg)
    assert torch.equal(columns[3, :size], torch.arange(size).float())
    inputs = [values(rank * to * 1000, rank + to) for to in range(size)]
    outputs = [torch.empty(rank * source * 1000) for source in range(size)]
    dist.all_to_all(outputs, inputs, group=pg)
    for source, output in enumerate(outputs):
        assert torch.equal(output, values(rank * source * 1000, rank + source))
    shares = [torch.empty(source * 5000) for source in range(size)]
    dist.all_gather(shares, torch.full((rank * 5000,), float(rank)), group=pg)
    for source, share in enumerate(shares):
        assert bool((share == source).all())


def test_more_than_gloo_can_do(world: World) -> None:
    world.run(beyond_gloo)


def misuse(worker: Worker) -> None:
    """The user's mistakes are told at once, and disturb no later operation."""
    pg, size = worker.kept["mnemosyne"], worker.size
    one = torch.ones(3)
    complex_one = torch.ones(3, dtype=torch.complex64)
    wrong: list[tuple[Any, ...]] = [
        (pg.allreduce, [one, torch.ones(4)]),
        (pg.allreduce, [torch.ones(2, 2).to_sparse_csr()]),
        (dist.all_reduce, one, dist.ReduceOp.BAND, pg),
        (pg.allreduce, [complex_one], dist.ReduceOp.MAX),
        (pg.broadcast, one, size),
        (pg.broadcast, one, -1),
        (pg.send, [one], worker.rank, 0),
        (pg.send, [one], size, 0),
        (pg._allgather_base, torch.empty(5), one),
        (pg._reduce_scatter_base, one, torch.empty(5)),
        (pg.allgather, [[one] * (size - 1)], [one]),
        (pg.gather, [], [one], dist.GatherOptions()) if worker.rank == 0 else (),
    ]
    for function, *args in filter(None, wrong):
        with pytest.raises((RuntimeError, TypeError)):
            function(*args)
    dist.barrier(group=pg)


def test_mistakes_are_told_at_submission(world: World) -> None:
    world.run(misuse)


def coalesce(worker: Worker) -> None:
    pg = worker.kept["mnemosyne"]
    tensors = [values(numel, worker.rank) for numel in (10, 70_000)]
    with dist._coalescing_manager(pg, torch.device("cpu"), async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor, group=pg)
    manager.wait()
    for tensor in tensors:
        shares = [values(tensor.numel(), source) for source in range(worker.size)]
        assert torch.equal(tensor, torch.stack(shares).sum(0))


def test_collectives_can_be_coalesced(world: World) -> None:
    world.run(coalesce)


def test_collectives_on_devices_can_be_coalesced(devices: World) -> None:
    devices.run(coalesce)


def numbers(worker: Worker) -> list[int]:
    backend = worker.kept["mnemosyne"]._get_backend(torch.device("cpu"))
    seen = []
    for _ in range(3):
        backend.barrier().wait()
        seen.append(backend._get_sequence_number_for_group())
    return seen


def test_sequence_numbers_grow_alike_on_all_ranks(world: World) -> None:
    [first, *others] = world.run(numbers)
    assert first == sorted(set(first))
    assert all(other == first for other in others)


EXIT_SCRIPT = """
import sys
import torch
from mnemosyne_plugin.ccl import Mesh, create_group

mesh = Mesh(worker_id=1, secret=b"x")
mesh.reconfigure(1, 0, [(1, mesh.address), (2, mesh.address[:-1] + "1")])
group = create_group(mesh, "g", [0, 1], 1000.0)
tensors = [torch.ones(1_000_000) for _ in range(3)]
works = [group.allreduce([tensor]) for tensor in tensors]
future = works[0].get_future().then(lambda f: f.value()[0].sum())
if sys.argv[1] == "drop":
    del works, tensors, future, mesh, group
if sys.argv[1] == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize("how", ["keep", "drop", "exit"])
def test_a_process_can_end_with_operations_in_flight(how: str) -> None:
    command = [sys.executable, "-c", EXIT_SCRIPT, how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert ended.returncode == (3 if how == "exit" else 0), ended.stderr


def make_late_group(worker: Worker) -> None:
    worker.kept["late"] = dist.new_group(backend="mnemosyne")


def pass_without(worker: Worker) -> str:
    with pytest.raises(RuntimeError) as caught:
        dist.monitored_barrier(worker.kept["late"], timedelta(seconds=0.5))
    assert worker.mesh.failure() is None
    return str(caught.value)


def test_a_monitored_barrier_names_who_is_missing(world: World) -> None:
    """Nothing but the barrier itself fails."""
    world.run(make_late_group)
    first, *others = world.run(pass_without, ranks=[0, 1, 3])
    assert first.startswith("Rank 2 failed to pass monitoredBarrier in 500 ms")
    assert all("waiting for send/recv from rank 0" in other for other in others)
    world.run(compare, "barriers")


def wait_in_vain(worker: Worker) -> list[str]:
    """Rank 0 waits for rank 1, which is told to send only later."""
    pg = worker.kept["mnemosyne"]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=29), pg)
    tensor = torch.empty(10)
    work = pg.recv([tensor], 1, 77)
    with pytest.raises(CollectiveTimeout, match=r"it waits for ranks \[1\]"):
        work.wait(timedelta(milliseconds=50))
    assert [one.timeout_s for one in worker.mesh.pending()] == [29.0]
    seen = [str(one) for one in worker.mesh.pending()]
    worker.kept["waiting"] = work, tensor
    return seen


def send_late(worker: Worker) -> None:
    worker.kept["mnemosyne"].send([torch.ones(10)], 0, 77).wait()


def end_waiting(worker: Worker) -> None:
    work, tensor = worker.kept["waiting"]
    work.wait()
    assert bool((tensor == 1).all())
    assert worker.mesh.pending() == []


def test_what_a_rank_waits_for_can_be_seen(world: World) -> None:
    [[line]] = world.run(wait_in_vain, ranks=[0])
    assert line.startswith("receive of group") and line.endswith("ranks [1]")
    world.run(send_late, ranks=[1])
    world.run(end_waiting, ranks=[0])
