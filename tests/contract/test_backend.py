"""One suite, several implementations: gloo is the oracle, we are the candidate."""

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import CASES
from world import Worker, World

TRANSPORTS = ("auto", "tcp")
SIZE = 4


@pytest.fixture(scope="module", params=TRANSPORTS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world, tempfile.TemporaryDirectory() as folder:
        world.run(make_groups, str(Path(folder) / "store"))
        yield world


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
        if name == "ddp":
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other), f"tensor {number}"


@pytest.mark.parametrize("name", CASES)
def test_a_collective_gives_what_gloo_gives(world: World, name: str) -> None:
    world.run(compare, name)


def test_links_are_of_the_kind_that_was_asked_for(world: World) -> None:
    counters = world.run(lambda_counters)
    for one in counters:
        assert one["links_open"] == SIZE - 1
        assert one["links_shm"] == (SIZE - 1 if world.transport == "auto" else 0)


def lambda_counters(worker: Worker) -> dict[str, int]:
    return worker.mesh.counters()
