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


@pytest.mark.timeout(240)
def test_ddp_survives_kills_and_an_abort_bit_for_bit(
    cluster: Job, tmp_path: Path
) -> None:
    example = ROOT / "examples" / "ddp_cpu.py"

    def job_in(
        folder: Path, chaos: list[str], script: Path = example, **env: str
    ) -> LocalCluster:
        return cluster(
            folder=folder,
            script=script,
            script_args=[f"--steps={STEPS}", f"--loss-log={folder / 'losses.txt'}"],
            chaos=chaos,
            preload=["torch._dynamo"],
            env=env,
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

    # The same on devices, of which host memory is one here.
    devices = {
        "MNEMOSYNE_DEVICE_GROUPS": "stand_in:links",
        "PYTHONPATH": str(ROOT / "tests" / "contract"),
    }
    job = job_in(tmp_path / "devices", chaos, **devices)
    assert job.wait(60) == [0], job.output()
    assert_same_training(job, healthy, kills)
    assert_survivors_stayed(job, kills)
    assert_redone_at_most_once(job)
    made = job.events("device_groups")
    assert {event.fields["made_anew"] for event in made} == {1}
    job.check_nothing_is_left()

    # A group that is aborted within a step: all redo it, and nobody is replaced.
    aborts = Path(__file__).parent / "scripts" / "abort_at_step.py"
    aborted = job_in(tmp_path / "aborted", [], aborts)
    assert aborted.wait(60) == [0], aborted.output()
    assert_same_training(aborted, healthy, {})
    assert_survivors_stayed(aborted, {})
    assert_redone_at_most_once(aborted)
    redone = {(e.fields["rank"], e.fields["step"]) for e in aborted.events("redo")}
    assert redone == {(rank, 12) for rank in range(4)}
    aborted.check_nothing_is_left()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_survives_kills_bit_for_bit(
    cluster: Job, tmp_path: Path, backend: str
) -> None:
    def job_in(folder: Path, chaos: list[str]) -> LocalCluster:
        return cluster(
            folder=folder,
            script=Path(__file__).parent / "scripts" / "compiled.py",
            script_args=[f"--backend={backend}", f"--loss-log={folder / 'losses.txt'}"],
            chaos=chaos,
            preload=["torch._dynamo"],
            env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        )

    healthy = job_in(tmp_path / "healthy", [])
    assert healthy.wait(200) == [0], healthy.output()
    chaos = ["kill rank=1 step=4 phase=forward", "kill rank=0 step=8 phase=vote"]
    job = job_in(tmp_path / "killed", chaos)
    assert job.wait(300) == [0], job.output()
    kills = {0: 1, 1: 1}
    assert_same_training(job, healthy, kills)
    assert_survivors_stayed(job, kills)
    assert job.output().count("has not waited for 0 works") == 4
    if backend != "inductor":  # which leaves headers among the temporary files
        job.check_nothing_is_left()
