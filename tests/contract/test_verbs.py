"""c10d's verbs of repair: abort, shutdown, shrink, reconfigure.

docs/design.md, "Verbs". The ProcessGroup objects stay the same throughout.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from world import Worker, World

from mnemosyne_plugin import ccl
from mnemosyne_plugin.errors import MnemosyneError

SIZE = 4
CPU = torch.device("cpu")
# Long before any timeout: whoever waits as long was not told.
PROMPT_S = 10.0

# What may become of an operation that a verb, or a death, comes in between.
INTERRUPTED = {
    "nothing",
    "CollectiveTimeout",
    "GroupAborted",
    "PeerLost",
    "StaleEpoch",
}

_numbers = itertools.count()


@pytest.fixture(scope="module", params=["auto", "tcp"])
def shared(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world:
        yield world


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    """All ranks alive, with a default group and two more, in the same processes."""
    shared.epoch += 1000  # the verbs have moved the mesh by themselves
    shared.heal()
    shared.run(begin, str(tmp_path))
    return shared


def begin(worker: Worker, folder: str) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    worker.kept = {"folder": folder, "number": 0}
    init(worker, f"{folder}/store", worker.rank, worker.size)
    worker.kept["world"] = dist.group.WORLD
    worker.kept["other"] = dist.new_group(list(range(worker.size)))
    worker.kept["pair"] = dist.new_group([worker.rank & ~1, worker.rank | 1])
    # As if it were new_group for all: each rank is in one of the two.
    dist.barrier()
    dist.barrier(worker.kept["other"])


def init(worker: Worker, store: str, rank: int, size: int) -> None:
    dist.init_process_group(
        "mnemosyne",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )


def total(worker: Worker, name: str, numel: int = 10) -> float:
    """All-reduce one more than the rank in the group that is kept by that name."""
    group = worker.kept[name]
    tensor = torch.full((numel,), float(group.rank() + 1))
    group.allreduce([tensor]).wait()
    assert bool((tensor == tensor[0]).all())
    return float(tensor[0])


def raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except MnemosyneError as error:
        return type(error).__name__
    return "nothing"


def fails(worker: Worker, name: str, numel: int = 10) -> str:
    return raised(lambda: total(worker, name, numel))


def backend_of(group: Any) -> Any:
    return group._get_backend(CPU)


# ---------------------------------------------------------------- abort, shutdown

ENDINGS: dict[str, Callable[[Any], None]] = {
    "group": lambda group: group.abort(),
    "backend": lambda group: backend_of(group).abort(),
    "torch": lambda group: c10d._abort_process_group(group),
}


def abort_while_waiting(worker: Worker, how: str, numel: int) -> tuple[str, str]:
    """Wait in the main thread, which cannot be interrupted, and abort from another."""
    caught: list[str] = []
    waits = threading.Thread(
        target=lambda: caught.append(fails(worker, "other", numel))
    )
    kept = worker.kept["world"].allreduce([torch.ones(numel)])
    waits.start()
    ENDINGS[how](worker.kept["other"])
    waits.join(PROMPT_S)
    assert not waits.is_alive()
    assert worker.mesh.failure() is None
    kept.wait()  # begun before, and none of its business
    return caught[0], raised(lambda: backend_of(worker.kept["other"]).barrier().wait())


def wait_to_be_told(worker: Worker, numel: int) -> str:
    kept = worker.kept["world"].allreduce([torch.ones(numel)])
    said = fails(worker, "other", numel)
    kept.wait()
    return said


def all_ones(worker: Worker, numel: int) -> None:
    worker.kept["world"].allreduce([torch.ones(numel)]).wait()


@pytest.mark.parametrize("numel", [10, 1_000_000])
@pytest.mark.parametrize("how", ENDINGS)
def test_an_abort_ends_one_group_on_all_ranks_and_no_other(
    world: World, how: str, numel: int
) -> None:
    world.start(wait_to_be_told, numel, ranks=[0, 2])
    world.start(abort_while_waiting, how, numel, ranks=[1])
    # Rank 3 does not come, so that nothing can have ended before the abort.
    world.run(all_ones, numel, ranks=[3])
    assert world.results([0, 2]) == ["GroupAborted"] * 2
    assert world.results([1]) == [("GroupAborted", "GroupAborted")]
    # Behind it all have read that the group is aborted: links keep the order.
    assert world.run(total, "world", numel) == [10.0] * SIZE
    assert world.run(fails, "other", ranks=[3]) == ["GroupAborted"]
    assert world.run(total, "pair") == [3.0] * SIZE


def abort_many(worker: Worker) -> set[str]:
    group = worker.kept["other"]
    works = [group.allreduce([torch.ones(1000)]) for _ in range(20)]
    group.abort()
    assert all(work.is_completed() for work in works)
    return {raised(work.wait) for work in works}


def test_all_that_is_in_flight_ends_when_abort_returns(world: World) -> None:
    assert world.run(abort_many, ranks=[2]) == [{"GroupAborted"}]
    assert world.run(total, "world") == [10.0] * SIZE  # links keep the order
    assert world.run(fails, "other") == ["GroupAborted"] * SIZE


def shut_down_while_waiting(worker: Worker, verbs: list[str]) -> str:
    work = worker.kept["other"].allreduce([torch.ones(100_000)])
    group = worker.kept["other"]
    for verb in verbs:
        if verb == "destroy":
            dist.destroy_process_group(group)
        else:
            getattr(group, verb)()
    said = raised(work.wait)
    assert raised(lambda: backend_of(group).barrier().wait()) == "GroupAborted"
    assert worker.mesh.failure() is None
    return said


@pytest.mark.parametrize(
    "verbs", [["shutdown"], ["destroy"], ["shutdown", "shutdown", "destroy"]]
)
def test_a_shutdown_lets_what_is_in_flight_end(world: World, verbs: list[str]) -> None:
    world.start(shut_down_while_waiting, verbs, ranks=[1])
    assert world.run(total, "other", 100_000, ranks=[0, 2, 3])  # rank 1 gave ones
    assert world.results([1]) == ["nothing"]
    # Who needs it is told, and nobody waits for it.
    said = set(world.run(fails, "other", ranks=[0, 2, 3]))
    assert said <= {"PeerLost", "GroupAborted"}
    assert world.run(total, "world") == [10.0] * SIZE


@pytest.mark.parametrize(
    "verbs",
    [
        ["abort", "shutdown"],
        ["shutdown", "abort"],
        ["abort", "abort", "destroy"],
        ["shutdown", "abort", "destroy", "abort", "shutdown"],
    ],
)
def test_the_verbs_come_in_any_order(world: World, verbs: list[str]) -> None:
    said = world.run(shut_down_while_waiting, verbs, ranks=[0, 3])
    assert said == ["GroupAborted"] * 2
    assert world.run(total, "world") == [10.0] * SIZE


def abort_all_and_begin_again(worker: Worker, store: str, numel: int) -> float:
    """As in-process restarts do it, while all kinds of operations are in flight."""
    for name in ("world", "other", "pair"):
        for _ in range(3):
            worker.kept[name].allreduce([torch.ones(numel)])
    worker.kept["world"].recv([torch.empty(3)], (worker.rank + 1) % SIZE, 7)
    c10d._abort_process_group()
    assert not dist.is_initialized()
    for name in ("world", "other", "pair"):
        assert fails(worker, name) == "GroupAborted"
    init(worker, store, worker.rank, worker.size)
    worker.kept["world"] = dist.group.WORLD
    return 0.0


def test_the_default_group_is_made_again_after_an_abort(world: World) -> None:
    folder = world.run(folder_of, ranks=[0])[0]
    for number in range(5):
        world.run(abort_all_and_begin_again, f"{folder}/again{number}", 50_000)
        assert world.run(total, "world", 50_000) == [10.0] * SIZE
        world.run(make_others)


def folder_of(worker: Worker) -> str:
    return str(worker.kept["folder"])


def make_others(worker: Worker) -> None:
    worker.kept["other"] = dist.new_group(list(range(worker.size)))
    worker.kept["pair"] = dist.new_group([worker.rank & ~1, worker.rank | 1])


# ---------------------------------------------------------------- shrink


def shrink(worker: Worker, exclude: list[int], flags: int) -> tuple[int, int, float]:
    """Shrink the default group while operations of it are in flight."""
    doomed = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(3)]
    group = dist.shrink_group(exclude, shrink_flags=flags)
    for work in doomed:
        assert raised(work.wait) in INTERRUPTED
    assert dist.group.WORLD is group
    worker.kept["small"] = group
    tensor = torch.full((1000,), float(group.rank() + 1))
    dist.all_reduce(tensor)
    assert bool((tensor == tensor[0]).all())
    return dist.get_rank(), dist.get_world_size(), float(tensor[0])


@pytest.mark.parametrize("victim", [0, 2, 3])
def test_survivors_shrink_the_default_group_while_a_rank_is_killed(
    world: World, victim: int
) -> None:
    survivors = [rank for rank in range(SIZE) if rank != victim]
    world.start(shrink, [victim], 1, ranks=survivors)
    world.kill(victim)
    places = world.results(survivors)
    assert places == [(place, 3, 6.0) for place in range(3)]
    # Ranks of torch are those of the smaller group now.
    assert world.run(make_two, ranks=survivors) == [3.0, 3.0, 0.0]


def make_two(worker: Worker) -> float:
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return 0.0
    tensor = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(tensor, group=group)
    return float(tensor)


def test_a_planned_shrink_disturbs_nobody_else(world: World) -> None:
    epochs = world.run(epoch_of)
    survivors = [0, 1, 3]
    world.start(keep_on, ranks=[2])
    for number in range(3):
        assert world.run(shrink_other, number, ranks=survivors) == [6.0] * 3
    assert world.results([2]) == ["GroupAborted"]
    assert world.run(total, "world") == [10.0] * SIZE
    assert world.run(epoch_of) == epochs


def epoch_of(worker: Worker) -> int:
    return worker.mesh.epoch


def keep_on(worker: Worker) -> str:
    """Wait for the others until one says that it goes on without this rank."""
    return fails(worker, "other")


def shrink_other(worker: Worker, number: int) -> float:
    group = worker.kept["other"]
    backend = backend_of(group)
    assert backend.supports_shrinking
    small = backend.shrink([2], 0)
    assert (small.rank(), small.size()) == ([0, 1, 3].index(worker.rank), 3)
    if number == 0:
        group.abort()
    tensor = torch.full((1000,), float(small.rank() + 1))
    small.allreduce([tensor]).wait()
    return float(tensor[-1])


def shrink_badly(worker: Worker) -> list[str]:
    backend = backend_of(worker.kept["other"])
    cases: list[list[int]] = [[], [4], [-1], [1, 1], [worker.rank]]
    return [raised(lambda case=case: backend.shrink(case, 0)) for case in cases]


def test_a_shrink_that_makes_no_sense_is_refused(world: World) -> None:
    assert world.run(shrink_badly) == [["ConfigError"] * 5] * SIZE
    assert world.run(total, "other") == [10.0] * SIZE


def shrink_one_by_one(worker: Worker, exclude: list[int]) -> float:
    """Shrink all groups that the dead were in, as the world goes on without them."""
    sums = 0.0
    for name in ("other", "world"):
        backend = backend_of(worker.kept[name])
        small = backend.shrink(exclude, 1)
        tensor = torch.ones(10)
        small.allreduce([tensor]).wait()
        sums += float(tensor[0])
    return sums


def test_two_groups_shrink_after_one_death(world: World) -> None:
    world.kill(3)
    assert world.run(shrink_one_by_one, [3], ranks=[0, 1, 2]) == [6.0] * 3


# ---------------------------------------------------------------- reconfigure


def handle(worker: Worker, name: str = "world") -> str:
    return ccl.get_reconfigure_handle(worker.kept[name])


def become(
    worker: Worker, name: str, uuid: int, handles: list[str], numel: int
) -> tuple[int, int, float]:
    """Reconfigure with operations in flight; the objects stay the same."""
    group = worker.kept[name]
    before = (id(group), group.group_name, id(dist.group.WORLD))
    doomed = [group.allreduce([torch.ones(numel)]) for _ in range(2)]
    assert ccl.supports_reconfigure(group)
    ccl.reconfigure(uuid, handles, group, timedelta(seconds=30)).wait()
    for work in doomed:
        assert raised(work.wait) in INTERRUPTED
    assert (id(group), group.group_name, id(dist.group.WORLD)) == before
    backend = backend_of(group)
    assert (backend.rank(), backend.size()) == (group.rank(), group.size())
    assert dist.get_rank(group) == group.rank()
    assert handles[group.rank()].split(":")[2] == str(worker.mesh.worker_id)
    return group.rank(), group.size(), total(worker, name, numel)


def reshape(world: World, name: str, ranks: list[int], numel: int = 1000) -> None:
    """Let the group be of these ranks of the test, in this order."""
    handles = [world.run(handle, name, ranks=[rank])[0] for rank in ranks]
    uuid = next(_numbers)
    got = world.run(become, name, uuid, handles, numel, ranks=ranks)
    size = len(ranks)
    assert got == [(place, size, size * (size + 1) / 2) for place in range(size)]


SHAPES = ([0, 1, 2], [2, 0], [1, 2, 0], [3], [3, 2, 1, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("numel", [10, 300_000])
def test_the_default_group_shrinks_grows_and_is_reordered(
    world: World, numel: int
) -> None:
    for ranks in SHAPES:
        reshape(world, "world", ranks, numel)
    # The numbers of the mesh, of torch and of the group are one and the same.
    assert world.run(places) == [(rank, rank, SIZE) for rank in range(SIZE)]
    world.run(make_others)
    assert world.run(total, "pair") == [3.0] * SIZE


def places(worker: Worker) -> tuple[int, int, int]:
    ranks = dist.get_process_group_ranks(worker.kept["world"])
    assert ranks == list(range(SIZE))
    return worker.mesh.rank, dist.get_rank(), dist.get_world_size()


@pytest.mark.parametrize("numel", [10, 300_000])
def test_another_group_is_reconfigured_without_a_new_epoch(
    world: World, numel: int
) -> None:
    epochs = world.run(epoch_of)
    for ranks in SHAPES:
        reshape(world, "other", ranks, numel)
        assert world.run(total, "world") == [10.0] * SIZE
    assert world.run(epoch_of) == epochs


def test_a_world_that_split_is_merged(world: World) -> None:
    for _ in range(3):
        reshape(world, "world", [0, 2])
        reshape(world, "world", [3, 1])
        reshape(world, "world", [1, 2, 3, 0])


def test_an_abort_is_mended_by_a_reconfigure(world: World) -> None:
    for name in ("other", "world"):
        world.run(abort_kept, name, ranks=[1])
        assert world.run(fails, name) == ["GroupAborted"] * SIZE
        reshape(world, name, [0, 1, 2, 3])


def abort_kept(worker: Worker, name: str) -> None:
    worker.kept[name].abort()


def test_a_timeout_is_mended_by_a_reconfigure(world: World) -> None:
    assert world.run(time_out, ranks=[1]) == ["CollectiveTimeout"]
    reshape(world, "world", [0, 1, 2, 3], numel=1)


def time_out(worker: Worker) -> str:
    group = worker.kept["world"]
    options = dist.AllreduceOptions()
    options.timeout = timedelta(milliseconds=100)
    return raised(lambda: group.allreduce([torch.ones(1)], options).wait())


def displaced(worker: Worker) -> tuple[str, str]:
    return fails(worker, "other"), fails(worker, "pair")


def test_groups_whose_ranks_mean_others_are_refused_until_told(world: World) -> None:
    reshape(world, "world", [1, 0, 3, 2])
    assert world.run(displaced) == [("StaleEpoch", "StaleEpoch")] * SIZE
    reshape(world, "other", [2, 0, 3, 1])
    assert world.run(total, "other") == [10.0] * SIZE


def test_a_fresh_worker_joins_and_takes_any_place(world: World, tmp_path: Path) -> None:
    for number, order in enumerate(([3, 0, 1, 2], [0, 1, 2, 3])):
        victim = order[1]
        world.start(wait_for_death, ranks=[r for r in range(SIZE) if r != victim])
        world.kill(victim)
        survivors = [rank for rank in range(SIZE) if rank != victim]
        assert set(world.results(survivors)) <= {"PeerLost", "StaleEpoch"}
        reshape(world, "world", survivors)
        world.replace(victim)
        member = world._members[victim]
        world.run(join_alone, str(tmp_path / f"{number}"), member, ranks=[victim])
        reshape(world, "world", order)
        reshape(world, "world", [0, 1, 2, 3])


def wait_for_death(worker: Worker) -> str:
    while True:
        said = fails(worker, "world", 100_000)
        if said != "nothing":
            return said


def join_alone(worker: Worker, store: str, member: tuple[int, str]) -> None:
    worker.mesh.reconfigure(0, 0, [member])
    init(worker, store, 0, 1)
    worker.kept["world"] = dist.group.WORLD


def reconfigure_badly(worker: Worker, handles: list[str]) -> list[str]:
    group = worker.kept["other"]
    parts = handles[0].split(":")
    foreign = ":".join([parts[0], str(int(parts[1]) ^ 1), *parts[2:]])
    stale = [":".join([*h.split(":")[:3], "0", *h.split(":")[4:]]) for h in handles]
    unknown = ":".join([*parts[:2], "9999", *parts[3:]])
    cases = [
        [],  # a world without this worker
        handles[: worker.rank] + handles[worker.rank + 1 :],
        [foreign, *handles[1:]],
        [*handles, handles[0]],
        ["nonsense", *handles],
        [parts[0], *handles],
        stale,
        [*handles, unknown],
    ]
    said = [
        raised(lambda case=case: ccl.reconfigure(10_000, case, group)) for case in cases
    ]
    ccl.reconfigure(10_001, handles, group).wait()
    said.append(raised(lambda: ccl.reconfigure(10_001, handles, group)))
    return said


def test_a_reconfigure_that_makes_no_sense_is_refused(world: World) -> None:
    handles = world.run(handle)
    want = ["ConfigError"] * 6 + ["StaleEpoch"] * 2 + ["ConfigError"]
    assert world.run(reconfigure_badly, handles) == [want] * SIZE
    assert world.run(total, "other") == [10.0] * SIZE
    assert world.run(total, "world") == [10.0] * SIZE


def old_handle(worker: Worker, handles: list[str]) -> str:
    return raised(lambda: ccl.reconfigure(10_002, handles, worker.kept["world"]))


def test_handles_of_an_older_epoch_are_refused(world: World) -> None:
    handles = world.run(handle)
    reshape(world, "world", [0, 1, 2, 3])
    assert world.run(old_handle, handles) == ["StaleEpoch"] * SIZE
    assert world.run(total, "world") == [10.0] * SIZE


def locked(worker: Worker, handles: list[str]) -> list[str]:
    worker.mesh.lock_membership()
    said = [raised(lambda: ccl.reconfigure(10_003, handles, worker.kept["world"]))]
    ccl.reconfigure(10_004, handles, worker.kept["other"]).wait()
    return said


def test_a_job_that_recovers_itself_keeps_its_membership(tmp_path: Path) -> None:
    with World(SIZE, "auto") as world:
        world.run(begin, str(tmp_path))
        handles = world.run(handle)
        assert world.run(locked, handles) == [["ConfigError"]] * SIZE
        assert world.run(total, "world") == [10.0] * SIZE
        assert world.run(total, "other") == [10.0] * SIZE


def test_nobody_waits_for_a_member_that_does_not_come(world: World) -> None:
    handles = world.run(handle)
    world.start(impatient, handles, ranks=[0, 1, 2])
    said = world.results([0, 1, 2])
    assert "CollectiveTimeout" in said
    assert set(said) <= {"CollectiveTimeout", "GroupAborted"}
    reshape(world, "world", [0, 1, 2, 3])


def impatient(worker: Worker, handles: list[str]) -> str:
    soon = timedelta(seconds=0.5)
    group = worker.kept["world"]
    return raised(lambda: ccl.reconfigure(10_005, handles, group, soon))


# ---------------------------------------------------------------- told by the mesh


def reseat(worker: Worker, ranks: list[int]) -> tuple[int, int]:
    group = worker.kept["world"]
    ccl.reseat(ranks, group)
    assert dist.group.WORLD is group
    return dist.get_rank(), dist.get_world_size()


def move(world: World, ranks: list[int]) -> None:
    """Move the mesh of these ranks of the test, as a job's manager does."""
    world.epoch += 1
    members = [world._members[rank] for rank in ranks]
    for place, rank in enumerate(ranks):
        world.run(seat, world.epoch, place, members, ranks=[rank])


def seat(worker: Worker, epoch: int, rank: int, members: list[Any]) -> None:
    worker.mesh.reconfigure(epoch, rank, members)


def test_a_group_lives_on_with_the_members_that_it_is_told(world: World) -> None:
    for ranks in ([0, 1, 3], [3, 0], [0, 1, 2, 3], [3, 1, 0], [0, 1, 2, 3]):
        size = len(ranks)
        move(world, ranks)
        places = [(place, size) for place in range(size)]
        assert world.run(reseat, list(range(size)), ranks=ranks) == places
        want = [size * (size + 1) / 2] * size
        assert world.run(total, "world", 100_000, ranks=ranks) == want


# ---------------------------------------------------------------- again and again


def footprint(worker: Worker) -> tuple[int, int, int]:
    threads = len(os.listdir("/proc/self/task"))
    fds = len(os.listdir("/proc/self/fd"))
    return threads, fds, worker.mesh.counters()["links_open"]


def churn(worker: Worker, base: int, handles: list[str], rounds: int) -> None:
    """Every verb on one group, while another is used all the time."""
    group = worker.kept["other"]
    for number in range(rounds):
        works = []
        if number % 3 > 0:  # else who is ahead leaves the others to end by themselves
            worker.kept["world"].barrier().wait()
            works = [group.allreduce([torch.ones(5000)]) for _ in range(3)]
        if number % 3 > 1 and number % SIZE == worker.rank:
            group.abort()
        steady = worker.kept["world"].allreduce([torch.ones(2000)])
        ccl.reconfigure(base + number, handles, group).wait()
        assert {raised(work.wait) for work in works} <= INTERRUPTED
        assert total(worker, "other", 100 + number) == 10.0
        steady.wait()


def test_a_hundred_rounds_leave_nothing_behind(world: World) -> None:
    handles = world.run(handle)
    world.run(churn, 20_000, handles, 5)
    before = world.run(footprint)
    world.run(churn, 30_000, handles, 100)
    for number in range(10):
        reshape(world, "world", [[0, 1, 2, 3], [3, 2, 1, 0]][number % 2])
    world.run(total, "world")
    assert world.run(footprint) == before


def survive(worker: Worker, uuid: int, handles: list[str]) -> str:
    """Reconfigure with all of them while one is killed: succeed, or be told."""
    group = worker.kept["world"]
    said = raised(lambda: ccl.reconfigure(uuid, handles, group).wait())
    return said if said != "nothing" else fails(worker, "world")


def test_a_member_is_killed_while_it_is_reconfigured_with(tmp_path: Path) -> None:
    with World(SIZE, "auto") as world:
        for number in range(6):
            victim = number % SIZE
            survivors = [rank for rank in range(SIZE) if rank != victim]
            folder = tmp_path / str(number)
            folder.mkdir()
            world.epoch += 1000
            world.heal()
            world.run(begin, str(folder))
            handles = world.run(handle)
            world.start(survive, next(_numbers), handles, ranks=range(SIZE))
            world.kill(victim)
            said = set(world.results(survivors))
            told = {"nothing", "PeerLost", "GroupAborted", "StaleEpoch"}
            assert said <= told
            reshape(world, "world", survivors)
