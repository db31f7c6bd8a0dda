"""The tests that torch ships for c10d backends, run on ours.

torch_suite.py says how. What is not run is in torch_suite_skips.py, each with its
reason: a test that is not named there must pass.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch_suite import Outcome, run_shipped, set_up, shipped_tests
from torch_suite_skips import SKIPPED
from world import Worker, World

SIZE = 4
REASON_OF = {name: reason for reason, names in SKIPPED.items() for name in names}


class Suite:
    """The workers, which are repaired between tests if a test has broken them."""

    def __init__(self, folder: str) -> None:
        for name in ("barrier", "test_dir", "init_dir"):
            Path(folder, name).mkdir()
        self.folder = folder
        self.number = 0
        # Its daemon thread answers; the port is chosen by the system.
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self.world = World(SIZE, "auto")
        self.world.run(set_up, self.store.port, folder)

    def run(self, name: str) -> list[Outcome]:
        self.number += 1
        outcomes = self.world.run(run_shipped, name, self.number)
        if any(self.world.run(has_failed)):
            self.world.seat()
        return outcomes

    def replace(self) -> None:
        for rank in range(SIZE):
            self.world.kill(rank)
        self.world.heal()
        self.world.run(set_up, self.store.port, self.folder)


def has_failed(worker: Worker) -> bool:
    return worker.mesh.failure() is not None


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(folder)
        with suite.world:
            yield suite


@pytest.mark.parametrize("name", [n for n in shipped_tests() if n not in REASON_OF])
def test_torch_ships(suite: Suite, name: str) -> None:
    try:
        outcomes = suite.run(name)
    except (TimeoutError, EOFError, OSError) as error:
        suite.replace()
        raise AssertionError(f"{name} hangs or kills a rank: {error}") from error
    for rank, outcome in enumerate(outcomes):
        assert outcome.kind == "passed", f"rank {rank} {outcome.kind}: {outcome.why}"


def test_every_skipped_test_exists() -> None:
    assert set(REASON_OF) <= set(shipped_tests())
    assert sum(len(names) for names in SKIPPED.values()) == len(REASON_OF)
