"""Plain torch DDP with the three lines of examples/ddp_cpu.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import ROOT, LocalCluster
from verdict import (
    assert_redone_at_most_once,
    assert_same_training,
    assert_survivors_stayed,
)

STEPS = 60
Job = Callable[..., LocalCluster]


@pytest.mark.timeout(120)
def test_ddp_survives_kills_bit_for_bit(cluster: Job, tmp_path: Path) -> None:
    def job_in(folder: Path, chaos: list[str]) -> LocalCluster:
        return cluster(
            folder=folder,
            script=ROOT / "examples" / "ddp_cpu.py",
            script_args=[f"--steps={STEPS}", f"--loss-log={folder / 'losses.txt'}"],
            chaos=chaos,
        )

    healthy = job_in(tmp_path / "healthy", [])
    assert healthy.wait(60) == [0], healthy.output()
    chaos = ["kill rank=1 step=15 phase=forward", "kill rank=0 step=30 phase=vote"]
    job = job_in(tmp_path / "killed", chaos)
    assert job.wait(60) == [0], job.output()
    kills = {0: 1, 1: 1}
    assert_same_training(job, healthy, kills)
    assert_survivors_stayed(job, kills)
    assert_redone_at_most_once(job)
    job.check_nothing_is_left()
