"""A worker dies around a checkpoint: nothing is torn, and nothing is loaded twice."""

import functools
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import CONFIGS, LocalCluster, lines
from verdict import assert_survivors_stayed

STEPS, EVERY = 16, 4
NO_SAVES = "--save-every=0"
SEEDED = Path(__file__).parent / "scripts" / "seed_each_step.py"
Job = Callable[..., LocalCluster]


def options(folder: Path, stage: int = 0, **section: Any) -> list[str]:
    """Return the example's arguments for a job that saves checkpoints."""
    config = json.loads((CONFIGS / "ds_config_gpt.json").read_text())
    config["zero_optimization"] = {"stage": stage}
    config["mnemosyne"] |= section
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config))
    return [
        f"--steps={STEPS}",
        f"--save-every={EVERY}",
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--deepspeed_config={path}",
        f"--loss-log={folder / 'losses.txt'}",
        f"--final-state={folder / 'final.txt'}",
    ]


def tags(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()}


def latest(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text()


def assert_same(job: LocalCluster, healthy: LocalCluster) -> None:
    """Same losses and final state; a newcomer may log steps again, or miss one."""
    got, want = set(lines(job.loss_log)), set(lines(healthy.loss_log))
    assert got <= want and len(want - got) <= 1, sorted(got ^ want)
    assert job.digests() == healthy.digests()


def run_plain(command: list[Any], output: Path) -> None:
    """Run a command that must succeed; nothing of it outlives the call."""
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            assert process.wait(100) == 0, output.read_text()
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
                process.wait(40)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], LocalCluster]:
    """Return the job of a ZeRO stage when nothing disturbs it."""

    @functools.cache
    def run(stage: int) -> LocalCluster:
        folder = tmp_path_factory.mktemp("healthy")
        args = options(folder, stage)
        with LocalCluster(folder=folder, script_args=args, num_standbys=0) as job:
            assert job.wait(90) == [0], job.output()
        job.check_nothing_is_left()
        assert latest(folder) == "global_step16"
        return job

    return run


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("stage", "rank", "phase"),
    [
        (0, 3, "save-vote"),
        pytest.param(1, 2, "save", marks=pytest.mark.long),
    ],
)
def test_a_death_in_a_save_costs_one_checkpoint_at_most(
    stage: int,
    rank: int,
    phase: str,
    cluster: Job,
    healthy: Callable[[int], LocalCluster],
    tmp_path: Path,
) -> None:
    folder = tmp_path
    job = cluster(
        folder=folder,
        script_args=options(folder, stage),
        chaos=[f"kill rank={rank} step=8 phase={phase}"],
    )
    assert job.wait(90) == [0], job.output()
    assert len(job.events("fault")) == 1
    assert_same(job, healthy(stage))
    assert_survivors_stayed(job, {rank: 1})
    job.check_nothing_is_left()
    wanted = {f"global_step{step}" for step in (4, 8, 12, 16)}
    assert tags(folder) | {"global_step8"} == wanted
    is_given_up = "checkpoint global_step8 was due or saved: it is given up"
    assert ("global_step8" not in tags(folder)) == (is_given_up in job.output())
    assert latest(folder) == "global_step16"
    assert not [name for name in tags(folder) if "saving" in name]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_job_that_was_resumed_survives_and_loads_nothing_twice(
    cluster: Job, healthy: Callable[[int], LocalCluster], tmp_path: Path
) -> None:
    shutil.copytree(healthy(1).folder / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text("global_step4")
    args = options(tmp_path, 1)
    good = tmp_path / "good"
    good.mkdir()
    shutil.copytree(tmp_path / "checkpoints", good / "checkpoints")
    resumed = cluster(folder=good, script_args=options(good, 1), num_standbys=0)
    assert resumed.wait(90) == [0], resumed.output()
    chaos = ["kill rank=1 step=0 phase=forward", "kill rank=3 step=6 phase=backward"]
    job = cluster(script_args=args, chaos=chaos)
    assert job.wait(120) == [0], job.output()
    assert len(job.events("fault")) == 2
    assert min(int(line.split()[0]) for line in lines(job.loss_log)) == 4
    assert_same(job, resumed)
    assert "not loaded over the state of the job" in job.output()
    job.check_nothing_is_left()


@pytest.mark.timeout(120)
def test_a_rank_lost_with_its_buddy_ends_the_job_and_names_the_checkpoint(
    cluster: Job, tmp_path: Path
) -> None:
    chaos = ["kill rank=1,2 step=6 phase=backward"]
    job = cluster(script_args=options(tmp_path, 1), chaos=chaos, num_standbys=2)
    assert job.wait(90) == [3], job.output()
    assert "NoSourceForState: the shards of ranks [1] are lost" in job.output()
    assert str(tmp_path / "checkpoints" / "global_step4") in job.output()
    assert latest(tmp_path) == "global_step4"
    job.check_nothing_is_left()


@pytest.mark.timeout(240)
def test_a_job_that_may_restart_goes_on_from_its_checkpoint(
    cluster: Job, tmp_path: Path
) -> None:
    job = cluster(
        script=SEEDED,
        script_args=options(tmp_path, 1, on_state_lost="restart"),
        chaos=["kill rank=1,2 step=6 phase=backward"],
        num_standbys=2,
    )
    assert job.wait(120) == [0], job.output()
    assert "NoSourceForState: the shards of ranks [1] are lost" in job.output()
    assert len(job.events("restarted")) == 1
    logged = Counter(lines(job.loss_log))  # step, rank, loss
    assert len(logged) == STEPS * 4  # what was made twice has the same loss
    twice = {int(line.split()[0]) for line, times in logged.items() if times == 2}
    assert twice == {4, 5}
    job.check_nothing_is_left()


@pytest.mark.timeout(400)
def test_a_job_told_to_end_leaves_a_checkpoint_that_plain_deepspeed_goes_on_from(
    cluster: Job, tmp_path: Path
) -> None:
    runs = {name: tmp_path / name for name in ("whole", "ended", "plain")}
    for folder in runs.values():
        folder.mkdir()
    args = options(runs["whole"], 1)
    # Of two ranks: the sum of more depends on the backend, in the last bit.
    two: dict[str, Any] = {"script": SEEDED, "procs_per_agent": 2, "num_standbys": 0}
    whole = cluster(folder=runs["whole"], script_args=args, **two)
    assert whole.wait(90) == [0], whole.output()

    checkpoints = str(tmp_path / "checkpoints")
    args = options(runs["ended"], 1, checkpoint_dir=checkpoints)
    job = cluster(folder=runs["ended"], script_args=[*args, NO_SAVES], **two)
    job.wait_for_step(5, 90)
    job.agents[0].send_signal(signal.SIGTERM)
    assert job.wait(60) == [128 + signal.SIGTERM], job.output()
    job.check_nothing_is_left()
    tag = (tmp_path / "checkpoints" / "latest").read_text()
    assert f"saved: {checkpoints}/{tag}" in job.output()
    num_steps = int(tag.removeprefix("global_step"))
    done = {int(line.split()[0]) for line in lines(job.loss_log)}
    assert done == set(range(num_steps)) and 5 < num_steps < STEPS

    args = options(runs["plain"], 1)
    config = json.loads((runs["plain"] / "ds_config.json").read_text())
    del config["mnemosyne"]
    (runs["plain"] / "ds_config.json").write_text(json.dumps(config))
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node=2", SEEDED, *args]
    command += [NO_SAVES, f"--checkpoint-dir={checkpoints}"]
    run_plain(command, runs["plain"] / "output.txt")
    logged = [*lines(job.loss_log), *lines(runs["plain"] / "losses.txt")]
    assert sorted(logged) == sorted(lines(whole.loss_log))
    finals = [lines(folder / "final.txt") for folder in (runs["whole"], runs["plain"])]
    assert sorted(finals[0]) == sorted(finals[1])
