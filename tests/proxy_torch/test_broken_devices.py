"""Devices that break where no proxy is to mend them: as on a plain GPU."""

from pathlib import Path

import pytest
from under_proxy import Job, needs_torch, train

pytestmark = [needs_torch, pytest.mark.timeout(600)]

LATE = "at=2000"  # some steps behind the set-up, twice


def train_as_on_a_gpu(folder: Path, *args: str, exit_code: int = 0) -> Job:
    return train(
        *("train_ddp.py", folder, *args),
        exit_code=exit_code,
        MNEMOSYNE_DEVICE_GROUPS="nccl",
    )


def train_on(folder: Path, *devices: str, exit_code: int = 0) -> Job:
    """Train with rank 1's workers on these devices, one after the other."""
    victim = ("--victim=1", "--devices", *devices)
    return train_as_on_a_gpu(folder, *victim, exit_code=exit_code)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train_as_on_a_gpu(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    ("fault", "cure"), [("illegal_address", "process"), ("ecc", "hardware")]
)
def test_a_broken_device_costs_one_worker(
    undisturbed: Job, tmp_path: Path, fault: str, cure: str
) -> None:
    job = train_on(tmp_path, f"fault={fault},{LATE}", "")
    assert job.lines == undisturbed.lines
    assert job.broken == [(1, cure)]
    assert sorted(rank for rank, _ in job.pids) == [0, 1, 1]


def test_a_device_that_breaks_in_the_same_step_again_ends_the_job(
    tmp_path: Path,
) -> None:
    break_it = ("--victim=1", "--break-in=3")
    job = train_as_on_a_gpu(tmp_path, *break_it, exit_code=1)
    assert job.broken == [(1, "process")] * 2
    assert "on node" in job.output and "again in step 3" in job.output
    assert sorted(rank for rank, _ in job.pids) == [0, 1, 1]


def test_a_device_with_two_defects_ends_the_job(tmp_path: Path) -> None:
    job = train_on(tmp_path, f"fault=ecc,{LATE}", exit_code=3)
    assert job.broken == [(1, "hardware")] * 2
    assert "take it out of service" in job.output


def test_out_of_memory_ends_the_job_at_once(tmp_path: Path) -> None:
    job = train_on(tmp_path, "memory=64m", exit_code=1)
    assert job.broken == [(1, "user")]
    assert "torch.OutOfMemoryError" in job.output
