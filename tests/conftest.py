"""Fixtures for all tests; tests/cluster.py holds the jobs of real processes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster import LocalCluster, training

# Jobs inherit it; a shell's background command, as of CI, would have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., LocalCluster]]:
    """Start a job: ``cluster(script=..., chaos=[...])``; it never outlives the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            LocalCluster(**{"folder": tmp_path, **options})
        )


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., LocalCluster]]:
    """Start the DeepSpeed example: ``train(steps=40, chaos=[...])``."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(training(tmp_path, **options))


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., LocalCluster]:
    """Return the same job when nothing disturbs it; each is run once for all tests."""
    ended: dict[str, LocalCluster] = {}

    def run(**options: Any) -> LocalCluster:
        key = repr(sorted(options.items()))
        if key not in ended:
            folder = tmp_path_factory.mktemp("undisturbed")
            with training(folder, num_standbys=0, **options) as job:
                assert job.wait() == [0], job.output()
            job.check_nothing_is_left()
            ended[key] = job
        return ended[key]

    return run
