"""DDP over NCCL, by torch's CUDA build: a rank's device is lost over and over."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from under_proxy import launch, needs_torch

from mnemosyne_plugin.events import read_events

pytestmark = [needs_torch, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Job:
    """What a job has left."""

    lines: set[str]
    num_recoveries: Mapping[int, int]
    pids: set[int]
    groups: set[tuple[int, tuple[int, ...]]]


def train(folder: Path, *args: str) -> Job:
    """Run train_ddp.py on two ranks to its good end."""
    launch(
        "train_ddp.py",
        *args,
        f"--log={folder / 'log'}",
        launcher=[
            "--nproc-per-node=2",
            "--device-timeout=2",
            f"--run-dir={folder / 'run'}",
        ],
    )
    events = read_events(folder / "run")
    recovered = [e.fields["rank"] for e in events if e.name == "device_recovered"]
    groups = [e.fields for e in events if e.name == "groups"]
    return Job(
        lines=set((folder / "log").read_text().splitlines()),
        num_recoveries={rank: recovered.count(rank) for rank in set(recovered)},
        pids={e.fields["pid"] for e in events if e.name == "seated"},
        groups={(each["rank"], tuple(each["ids"])) for each in groups},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_device_dies_at_random_commands_changes_nothing(
    undisturbed: Job, tmp_path: Path, victim: int
) -> None:
    job = train(tmp_path, f"--victim={victim}")
    assert job.lines == undisturbed.lines
    assert len(job.lines) == 26  # 12 steps and a hash of each rank
    assert set(job.num_recoveries) == {victim}
    assert job.num_recoveries[victim] > 10
    assert len(job.pids) == len(job.groups) == 2


def test_a_device_that_hangs_is_replaced_and_others_are_not(
    undisturbed: Job, tmp_path: Path
) -> None:
    job = train(
        tmp_path, "--victim=1", "--fault=hang", "--kill-within=4000", "--steps=12"
    )
    assert job.lines == undisturbed.lines
    assert set(job.num_recoveries) == {1}
    assert len(job.pids) == len(job.groups) == 2
    hangs = [e for e in read_events(tmp_path / "run") if e.name == "device_hangs"]
    assert hangs
    assert {event.fields["rank"] for event in hangs} == {1}
