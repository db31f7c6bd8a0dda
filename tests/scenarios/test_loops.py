"""A newcomer gets to the epoch and batch where the job is, in every kind of loop."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import LocalCluster
from verdict import assert_survived

SCRIPT = Path(__file__).parent / "scripts" / "loops.py"
NUM_RANKS = 2
NUM_STEPS = 4 * 5  # epochs, batches
Job = Callable[..., LocalCluster]
CHAOS = {  # in the first epoch, in a later one, and at an epoch's end
    0: ["kill rank=0 step=2 phase=data", "kill rank=0 step=13 phase=optimizer"],
    1: ["kill rank=1 step=7 phase=backward", "kill rank=1 step=15 phase=data"],
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("loop", "rank"),
    [
        ("epochs of training_data", 0),
        ("steps of a RepeatingLoader", 1),
        ("epochs of resumable loaders", 1),
    ],
)
def test_a_newcomer_arrives_at_the_right_batch(
    loop: str, rank: int, cluster: Job, tmp_path: Path
) -> None:
    def job_in(folder: Path, chaos: list[str]) -> LocalCluster:
        return cluster(
            folder=folder,
            script=SCRIPT,
            procs_per_agent=NUM_RANKS,
            chaos=chaos,
            env={"LOOP": loop, "FOLDER": str(folder)},
        )

    healthy = job_in(tmp_path / "healthy", [])
    assert healthy.wait(80) == [0], healthy.output()
    healthy.check_nothing_is_left()
    assert len(healthy.losses()) == NUM_RANKS * NUM_STEPS
    job = job_in(tmp_path / "killed", CHAOS[rank])
    assert job.wait(80) == [0], job.output()
    # A process with loader workers that is killed leaves these, under any launcher.
    for folder in (tmp_path / "killed" / "tmp").glob("pymp-*"):
        shutil.rmtree(folder)
    assert_survived(job, healthy, {rank: 2})
