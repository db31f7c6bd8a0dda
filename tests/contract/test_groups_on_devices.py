"""Groups whose tensors lie on devices; links of their own stand in for NCCL."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
import torch.distributed as dist
from world import Worker, World

from mnemosyne_plugin.ccl.graphs import Graphs
from mnemosyne_plugin.ccl.mesh import create_device_group, create_group
from mnemosyne_plugin.errors import (
    ConfigError,
    MnemosyneError,
    RecoverableError,
)
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.recovery.control import ControlGroup
from mnemosyne_plugin.recovery.device_groups import DeviceGroups

SIZE = 4
RANKS = {"world": [0, 1, 2, 3], "low": [0, 1], "high": [1, 2, 3]}
TIMEOUT = timedelta(seconds=30)


@pytest.fixture(scope="module", params=["auto", "tcp"])
def shared(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world:
        yield world


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    """All ranks alive, with three groups, of which each rank has those it is in."""
    shared.heal()
    shared.run(begin, str(tmp_path))
    assert shared.run(settle) == ["settled"] * SIZE
    return shared


def begin(worker: Worker, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", SIZE)
    devices = stand_in.links()

    def make(store: Any, rank: int, size: int) -> Any:
        match worker.kept.pop("fate", ""):
            case "fails":
                raise RuntimeError("no such device")
            case "dies":
                os._exit(1)
        return devices.make(store, rank, size, TIMEOUT, None)

    groups = {
        name: create_device_group(
            worker.mesh,
            name + folder,
            ranks,
            TIMEOUT.total_seconds(),
            device_type="cpu",
            store=store,
            make=make,
        )
        for name, ranks in RANKS.items()
        if worker.rank in ranks
    }
    graphs = Graphs(
        worker.mesh,
        lambda: list(groups.values()),
        lambda: Mark(worker.kept["is_done"]),
    )
    manager = DeviceGroups(
        devices,
        worker.mesh,
        worker.rank,
        EventLog(folder, f"{worker.rank}"),
        graphs=graphs,
        find=lambda: list(groups.values()),
    )
    worker.kept = {"groups": groups, "manager": manager, "graphs": graphs}


@contextmanager
def reader(worker: Worker) -> Iterator[None]:
    """Release what the main thread waits for when a failure is seen, as a rank does."""
    over = os.eventfd(0)

    def read() -> None:
        if (
            worker.mesh.failure_fd
            in select.select([worker.mesh.failure_fd, over], [], [])[0]
        ):
            worker.kept["manager"].release()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(over, 1)
        thread.join()
        os.close(over)


def settle(worker: Worker) -> str:
    """Repair the groups as a recovery does, on all ranks."""
    try:
        with reader(worker):
            worker.kept["manager"].settle(ControlGroup(worker.mesh, worker.size))
    except RecoverableError as error:
        return type(error).__name__
    return "settled"


def total(worker: Worker, name: str, numel: int = 10) -> float:
    """All-reduce one more than the rank."""
    tensor = torch.full((numel,), worker.rank + 1.0)
    worker.kept["groups"][name].allreduce([tensor]).wait()
    assert bool((tensor == tensor[0]).all())
    return float(tensor[0])


def totals(worker: Worker) -> dict[str, float]:
    return {name: total(worker, name) for name in worker.kept["groups"]}


RIGHT = [
    {name: sum(ranks) + len(ranks) for name, ranks in RANKS.items() if rank in ranks}
    for rank in range(SIZE)
]


def remember(worker: Worker) -> int:
    """Keep what moves each group's tensors; return how many have such a thing."""
    groups = worker.kept["groups"].items()
    worker.kept["seen"] = {name: group.inner for name, group in groups}
    return sum(inner is not None for inner in worker.kept["seen"].values())


def kept(worker: Worker) -> set[str]:
    """Return the groups that have what ``remember`` has seen."""
    seen = worker.kept["seen"]
    groups = worker.kept["groups"].items()
    return {name for name, group in groups if group.inner is seen[name]}


def lose_a_member(worker: Worker, wait: Callable[..., Any], *args: Any) -> str:
    """Have ``wait`` wait for a rank that dies, as the main thread of a rank does."""
    try:
        with reader(worker):
            wait(worker, *args)
        return "nothing"
    except MnemosyneError as error:
        return type(error).__name__


def hand_over(worker: Worker) -> None:
    """Send a message from rank 0 to rank 1."""
    tensor, group = torch.full((5,), float(worker.rank)), worker.kept["groups"]["low"]
    if worker.rank == 0:
        group.send([tensor], 1, 0).wait()
    else:
        group.recv([tensor], 0, 0).wait()
        assert tensor.tolist() == [0.0] * 5


def replace(world: World, tmp_path: Path) -> None:
    world.heal()
    world.run(begin, str(tmp_path), ranks=[3])


def num_operations(worker: Worker) -> int:
    return worker.mesh.counters()["ops"]


def test_each_group_connects_at_its_first_use(world: World) -> None:
    assert world.run(remember) == [0] * SIZE
    before = world.run(num_operations)
    assert world.run(totals) == RIGHT
    assert world.run(num_operations) == before  # the mesh has carried none of it
    assert world.run(remember) == [len(right) for right in RIGHT]


def test_only_groups_of_the_lost_rank_are_made_anew(
    world: World, tmp_path: Path
) -> None:
    world.run(totals)
    world.run(hand_over, ranks=[0, 1])
    world.run(remember)
    world.start(lose_a_member, total, "high", 100_000, ranks=[1, 2])
    world.start(lose_a_member, total, "world", 100_000, ranks=[0])
    world.kill(3)
    # "world" is aborted with the others, though rank 0 alone was waiting in it.
    assert set(world.results([0, 1, 2])) <= {"PeerLost", "StaleEpoch"}
    replace(world, tmp_path)
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(kept, ranks=[0, 1, 2]) == [{"low"}, {"low"}, set()]
    assert world.run(totals) == RIGHT
    # All were connected by the repair itself, the newcomer's too.
    assert world.run(remember) == [len(right) for right in RIGHT]


def ask_in_vain(worker: Worker) -> None:
    worker.kept["works"] = worker.kept["groups"]["low"].allreduce([torch.ones(5)])


def send_in_vain(worker: Worker) -> None:
    worker.kept["works"] = worker.kept["groups"]["low"].send([torch.ones(5)], 1, 0)


@pytest.mark.parametrize("begun", [ask_in_vain, send_in_vain])
def test_a_group_with_something_in_flight_is_made_anew(
    world: World, begun: Any
) -> None:
    world.run(totals)
    world.run(begun, ranks=[0])
    world.run(remember)
    world.seat()
    assert world.run(settle) == ["settled"] * SIZE
    assert "low" not in world.run(kept, ranks=[0])[0]
    assert world.run(kept, ranks=[2]) == [{"world", "high"}]
    assert world.run(totals) == RIGHT


def meet(worker: Worker, fate: str) -> None:
    worker.kept["fate"] = fate


@pytest.mark.parametrize("fate", ["fails", "dies"])
def test_a_failure_while_groups_are_made_anew_is_everybodys(
    world: World, tmp_path: Path, fate: str
) -> None:
    world.run(totals)
    world.kill(3)
    replace(world, tmp_path)
    world.run(meet, fate, ranks=[3])
    world.start(settle, ranks=range(SIZE))
    if fate == "fails":
        # As the leader does: the others wait for rank 3 in their store.
        assert world.results([3]) == ["StaleEpoch"]
        world.kill(3)
    results = world.results([0, 1, 2])
    # Rank 0 does not need the group in which rank 3 has come to nothing.
    assert results[1:] == ["PeerLost"] * 2 and results[0] in ("PeerLost", "settled")
    replace(world, tmp_path)
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(totals) == RIGHT


def fail_in_a_step(worker: Worker) -> None:
    group = worker.kept["groups"]["low"]
    worker.mesh.absorb(True)
    worker.mesh.fence("a test", -1)
    worker.kept["manager"].release()
    tensor, others = torch.ones(3), [torch.ones(3) for _ in range(2)]
    group.allreduce([tensor]).wait()
    work = group.allgather([others], [tensor])
    work.wait()
    assert work.get_future().value() is not None
    assert tensor.tolist() == [1.0] * 3  # inputs stay
    assert [other.tolist() for other in others] == [[0.0] * 3] * 2  # and are finite
    worker.mesh.absorb(False)
    with pytest.raises(RecoverableError):
        group.allreduce([tensor])


def test_failures_in_a_step_are_absorbed(world: World) -> None:
    world.run(totals)
    world.run(fail_in_a_step, ranks=[0, 1])
    world.seat()
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(totals) == RIGHT


def fail_inside(worker: Worker) -> str:
    """Have what moves the tensors fail on this rank, which waits for nothing."""
    worker.kept["groups"]["low"].allreduce([torch.ones(5)])
    stand_in.meshes[-1].fence("the fabric is gone", -1)
    while not select.select([worker.mesh.failure_fd], [], [], 0.01)[0]:
        worker.kept["manager"].watch()
    worker.kept["manager"].release()
    return str(worker.mesh.failure())


def test_what_a_group_alone_notices_is_everybodys_failure(world: World) -> None:
    world.run(total, "low", ranks=[0, 1])
    (seen,) = world.run(fail_inside, ranks=[0])
    assert "failed on its device" in seen and "the fabric is gone" in seen
    world.seat()
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(totals) == RIGHT


def carry(worker: Worker) -> list[float]:
    """Have ranks 0 and 2 send rank 3 a part each of what it lacks."""
    carrier = worker.kept["manager"].carrier
    assert carrier.device_type == "cpu"
    tensor = torch.full((100_000,), float(worker.rank))
    halves = tensor[:50_000], tensor[50_000:]
    match worker.rank:
        case 0 | 2:
            carrier.move([(halves[worker.rank // 2], 3)], [])
        case 3:
            carrier.move([], [(halves[0], 0), (halves[1], 2)])
            assert carrier.received_bytes == tensor.nbytes
    return [float(half.mean()) for half in halves]


def test_state_is_carried_by_a_group_of_all_ranks(world: World, tmp_path: Path) -> None:
    assert world.run(no_carrier) == [True] * SIZE  # nobody has used one yet
    world.run(totals)
    world.kill(3)
    replace(world, tmp_path)
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(carry)[3] == [0.0, 2.0]
    assert world.run(totals) == RIGHT
    world.start(lose_a_member, carry, ranks=[3])
    world.kill(2)
    assert world.results([3])[0] in ("PeerLost", "StaleEpoch")
    world.heal()
    world.run(begin, str(tmp_path), ranks=[2])
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(carry)[3] == [0.0, 2.0]


def no_carrier(worker: Worker) -> bool:
    return worker.kept["manager"].carrier is None


def send_and_meet(worker: Worker, folder: str) -> None:
    """Have all ranks meet in a group that ranks 0 and 1 alone have used."""

    def make(store: Any, rank: int, size: int) -> Any:
        # As NCCL's, it is made by each rank for itself.
        return create_group(worker.mesh, f"inner {folder}", range(size), 5.0)

    group = create_device_group(
        worker.mesh,
        folder,
        range(SIZE),
        5.0,
        device_type="cpu",
        store=dist.FileStore(f"{folder}/store", SIZE),
        make=make,
    )
    if worker.rank < 2:
        send_or_receive = [group.send, group.recv][worker.rank]
        send_or_receive([torch.ones(5)], 1 - worker.rank, 0).wait()
    group.barrier().wait()
    group.allreduce([torch.ones(5)]).wait()
    group.barrier().wait()
    assert group.inner is not None


def test_ranks_meet_though_not_all_have_used_the_group(
    world: World, tmp_path: Path
) -> None:
    world.run(send_and_meet, str(tmp_path))


def destroy(worker: Worker) -> None:
    """Have no such group any more, as a script that is done with it."""
    worker.kept["groups"].pop("low").abort()


def test_a_group_that_a_member_has_destroyed_is_not_waited_for(world: World) -> None:
    world.run(totals)
    world.run(destroy, ranks=[0])
    world.seat()
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(remember) == [1, 2, 2, 2]  # rank 1 has let go of its own
    assert world.run(total, "world") == [10.0] * SIZE


def set_up(worker: Worker) -> bytes:
    """Leave a log, and one large tensor that is not in it."""
    worker.mesh.start_recording()
    assert total(worker, "low") == 3.0
    assert worker.kept["groups"]["low"].inner is None
    assert total(worker, "low", 100_000) == 3.0
    assert worker.kept["groups"]["low"].inner is not None
    return worker.mesh.stop_recording()


def set_up_alone(worker: Worker, log: bytes) -> None:
    worker.mesh.start_replay(log)
    assert total(worker, "low") == 3.0
    assert total(worker, "low", 100_000) == 1.0  # skipped: its state comes later
    worker.mesh.stop_replay()
    assert worker.kept["groups"]["low"].inner is None


def test_a_newcomer_makes_the_set_up_alone(world: World, tmp_path: Path) -> None:
    log = world.run(set_up, ranks=[0, 1])[0]
    world.kill(0)
    world.heal()
    world.run(begin, str(tmp_path), ranks=[0])
    world.run(set_up_alone, log, ranks=[0])
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(totals) == RIGHT


class Graph:
    """Stands in for torch.cuda.CUDAGraph, with the device done at once."""

    num_launches = 0

    def capture_begin(self) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        self.num_launches += 1


def capture(worker: Worker, *names: str) -> None:
    """Capture a graph with an operation of each of these groups of the rank."""
    watched = type("Watched", (Graph,), {})
    worker.kept["graphs"].watch(watched)
    worker.kept["graph"] = graph = watched()
    graph.capture_begin()
    for name in worker.kept["groups"]:
        if name in names:
            total(worker, name)
    graph.capture_end()


class Mark:
    """Stands in for an event behind a launch."""

    def __init__(self, is_done: bool) -> None:
        self.query = lambda: is_done


def replay(worker: Worker, is_done: bool = True) -> str:
    worker.kept["is_done"] = is_done
    before = worker.kept["graph"].num_launches
    try:
        worker.kept["graph"].replay()
    except MnemosyneError as error:
        return type(error).__name__
    return "launched" if worker.kept["graph"].num_launches > before else "skipped"


def test_a_graph_dies_with_what_moves_its_groups(world: World, tmp_path: Path) -> None:
    world.run(totals)
    world.run(capture, "low", "high")
    assert world.run(replay) == ["launched"] * SIZE
    world.start(lose_a_member, total, "high", 100_000, ranks=[1, 2])
    world.start(lose_a_member, total, "world", 100_000, ranks=[0])
    world.kill(3)
    world.results([0, 1, 2])
    replace(world, tmp_path)
    assert world.run(settle) == ["settled"] * SIZE
    lost = "GraphLost"
    assert world.run(replay, ranks=[0, 1, 2]) == ["launched", lost, lost]
    world.run(capture, "high", ranks=[1, 2, 3])
    assert world.run(replay, ranks=[1, 2, 3]) == ["launched"] * 3
    world.seat()  # rank 0 has launched what rank 1 has not
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(replay) == [lost] + ["launched"] * 3


def fail_behind_a_launch(worker: Worker) -> list[str]:
    """Have a failure come while the device is at a graph, in a step."""
    seen = [replay(worker, is_done=False)]
    worker.mesh.absorb(True)
    worker.mesh.fence("of a test")
    worker.kept["manager"].release()
    seen.append(replay(worker))
    worker.mesh.absorb(False)
    seen.append(replay(worker))
    return seen


def test_a_graph_that_is_under_way_is_ended_and_none_is_launched_behind_a_failure(
    world: World,
) -> None:
    world.run(totals)
    world.run(capture, "low", ranks=[0, 1])
    assert (
        world.run(fail_behind_a_launch, ranks=[0, 1])
        == [["launched", "skipped", "StaleEpoch"]] * 2
    )
    world.seat()
    assert world.run(settle) == ["settled"] * SIZE
    assert world.run(replay, ranks=[0, 1]) == ["GraphLost"] * 2
    assert world.run(totals) == RIGHT


def capture_in_set_up(worker: Worker) -> None:
    worker.mesh.start_recording()
    with pytest.raises(ConfigError, match="in front of the first step"):
        capture(worker, "low")
    worker.kept["graph"].capture_end()
    worker.mesh.stop_recording()


def test_a_graph_of_a_set_up_is_refused(world: World) -> None:
    world.run(capture_in_set_up, ranks=[0])
