"""megatron.core over NCCL, by torch's CUDA build: ranks lose devices, workers die."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from under_proxy import Job, needs_torch, run_ranks, train

pytestmark = [needs_torch, pytest.mark.timeout(900)]

PROGRAM = "train_megatron.py"
LAYOUTS = {
    "dp2": ["--dropout=0.1", "--random"],
    "tp2": ["--tensor=2", "--dtype=bf16"],
    "pp2": ["--pipeline=2"],
    "distributed": ["--distributed-optimizer", "--position=rope"],
    "overlapped": ["--distributed-optimizer", "--overlap", "--dtype=bf16"],
}


def run(
    folder: Path, *args: str, device_timeout_s: int = 60, chaos: Sequence[str] = ()
) -> Job:
    return train(PROGRAM, folder, *args, device_timeout_s=device_timeout_s, chaos=chaos)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    @cache
    def job(layout: str) -> Job:
        return run(tmp_path_factory.mktemp(layout), *LAYOUTS[layout])

    return job


def losses(lines: set[str]) -> dict[tuple[str, ...], float]:
    """Return (step, rank) -> loss."""
    words = [line.split() for line in lines if line[0].isdigit()]
    return {(step, rank): float(loss) for step, rank, _, loss in words}


@pytest.mark.parametrize(
    "layout, tolerance",
    [("tp2", 5e-3), ("pp2", 2e-4), ("distributed", 2e-4), ("overlapped", 5e-3)],
)
def test_a_gpt_of_megatron_learns_as_on_the_cpu(
    undisturbed: Callable[[str], Job], tmp_path: Path, layout: str, tolerance: float
) -> None:
    on_device = losses(undisturbed(layout).lines)
    arguments = [*LAYOUTS[layout], f"--log={tmp_path / 'log'}"]
    run_ranks(2, PROGRAM, *arguments, on_proxy=False)
    on_cpu = losses(set((tmp_path / "log").read_text().splitlines()))
    assert on_device == pytest.approx(on_cpu, abs=tolerance)
    assert on_device["11", "0"] < on_device["0", "0"] - 0.5


@pytest.mark.parametrize(
    "layout, victim",
    [("dp2", 0), ("tp2", 1), ("pp2", 0), ("pp2", 1), ("distributed", 0)]
    + [("overlapped", 1)],
)
def test_a_rank_whose_device_dies_at_random_commands_changes_nothing(
    undisturbed: Callable[[str], Job], tmp_path: Path, layout: str, victim: int
) -> None:
    job = run(tmp_path, *LAYOUTS[layout], f"--victim={victim}")
    assert job.lines == undisturbed(layout).lines
    assert len(job.lines) == 26  # 12 steps and a hash of each rank
    assert set(job.num_recoveries) == {victim}
    assert job.num_recoveries[victim] > 6
    assert len(job.pids) == len(job.groups) == 2


def test_a_device_that_hangs_is_replaced_and_others_are_not(
    undisturbed: Callable[[str], Job], tmp_path: Path
) -> None:
    hang = ["--victim=1", "--fault=hang", "--kill-within=3000"]
    job = run(tmp_path, *LAYOUTS["pp2"], *hang, device_timeout_s=5)
    assert job.lines == undisturbed("pp2").lines
    assert set(job.num_recoveries) == {1}
    assert len(job.pids) == len(job.groups) == 2
    assert set(job.ranks_that_hung) == {1}


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", "overlapped"])
def test_workers_that_die_are_replaced_over_nccl(
    undisturbed: Callable[[str], Job], tmp_path: Path, layout: str
) -> None:
    chaos = ["kill rank=1 step=4 phase=forward", "kill rank=0 step=8 phase=vote"]
    job = run(tmp_path, *LAYOUTS[layout], chaos=chaos)
    assert job.lines == undisturbed(layout).lines
    assert sorted(rank for rank, _ in job.pids) == [0, 0, 1, 1]
