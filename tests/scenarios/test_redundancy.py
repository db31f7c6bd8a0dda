"""What the user may choose in place of the defaults, with workers that die."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import LocalCluster
from matrix.deepspeed_plan import Configuration
from matrix.runs import first_difference
from verdict import assert_survivors_stayed

STEPS = 15
# On one rank at the least: the whole model, a shard of it, one stage of it.
PARAMETERS = {"zero0": 2592, "zero1": 648, "zero3": 648, "pipe": 1488}
Job = Callable[..., LocalCluster]


def start(
    cluster: Job,
    folder: Path,
    configuration: Configuration,
    chaos: list[str],
    *,
    steps: int = STEPS,
    **section: Any,
) -> LocalCluster:
    """Start the matrix's training with this section of ds_config."""
    folder.mkdir()
    config = folder / "ds_config.json"
    config.write_text(json.dumps(configuration.ds_config | {"mnemosyne": section}))
    stages = [arg for arg in configuration.script_args if arg.startswith("--stages")]
    args = [
        *(f"--steps={steps}", f"--deepspeed_config={config}", *stages),
        *(f"--loss-log={folder / 'losses.txt'}",),
        *(f"--final-state={folder / 'final.txt'}",),
    ]
    return cluster(
        folder=folder, script=Configuration.script, script_args=args, chaos=chaos
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "every"), [pytest.param("pipe", 3, marks=pytest.mark.long), ("zero3", 2)]
)
def test_two_buddies_outlive_two_neighbours_and_rare_snapshots_cost_steps(
    mode: str, every: int, cluster: Job, tmp_path: Path
) -> None:
    configuration = Configuration(mode, "fp32")
    chaos = [
        "kill rank=1 step=5 phase=backward",
        "kill rank=2 step=5 phase=backward",
        "kill rank=3 step=8 phase=mid-optimizer",
        "kill rank=0 step=12 phase=between",
    ]
    section = {"redundancy": "buddy", "buddies": 2, "snapshot_every": every}
    job = start(cluster, tmp_path / "job", configuration, chaos, **section)
    assert job.wait(200) == [0], job.output()
    healthy = start(cluster, tmp_path / "healthy", configuration, [], redundancy="none")
    assert healthy.wait(90) == [0], healthy.output()

    assert job.output().count("mnemosyne: a snapshot of rank 0 has ") == 1
    costs = {e.fields["rank"]: e.fields for e in job.events("snapshot")}
    assert costs.keys() == set(range(4))
    for cost in costs.values():
        assert cost["step"] % every == 0
        assert cost["image_bytes"] >= 12 * PARAMETERS[mode]
        assert cost["sent_bytes"] == 2 * cost["image_bytes"]
        assert cost["host_bytes"] >= 2 * 3 * 12 * PARAMETERS[mode]
    assert first_difference(job, healthy) is None
    assert job.digests() == healthy.digests()
    assert len(job.events("fault")) == len(chaos)
    assert_survivors_stayed(job, {0: 1, 1: 1, 2: 1, 3: 1})
    # By its backward, step 5 has taken in no snapshot that is younger than its begin.
    first = min(event.fields["epoch"] for event in job.events("redo"))
    begun = {e.fields["step"] for e in job.events("redo") if e.fields["epoch"] == first}
    assert begun <= {5 - 5 % every, 5 - 5 % every - every} - {0}, begun
    steps = {event.fields["step"] % every for event in job.events("redo")}
    assert steps == {0}, "went back to a version without a snapshot"
    job.check_nothing_is_left()


@pytest.mark.timeout(90)
def test_without_redundancy_a_death_starts_the_job_again_which_had_said_so(
    cluster: Job, tmp_path: Path
) -> None:
    configuration = Configuration("zero1", "fp32")
    section = {"steps": 60, "redundancy": "none"}
    job = start(cluster, tmp_path / "job", configuration, [], **section)
    job.wait_for_step(0)
    assert "mnemosyne: NOT protected" in job.output()
    job.kill(1)
    assert job.wait(60) == [0], job.output()
    assert len(job.events("restarted")) == 1
    job.check_nothing_is_left()
