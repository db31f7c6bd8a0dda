"""`mnemosyne run --device-proxy`: a lost device costs a step, and no worker."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import LocalCluster
from verdict import (
    assert_redone_at_most_once,
    assert_same_training,
    assert_survivors_stayed,
)

SCRIPT = Path(__file__).parent / "scripts" / "lose_devices.py"
STEPS = 24
NUM_RANKS = 3
EMULATED = {"MNEMOSYNE_PROXY_DEVICE": "emulated", "DS_ACCELERATOR": "cpu"}
Job = Callable[..., LocalCluster]


@pytest.mark.timeout(180)
def test_a_lost_device_costs_no_worker_and_no_bit(cluster: Job, tmp_path: Path) -> None:
    def job_in(folder: Path, lose: list[str], launch: list[str]) -> LocalCluster:
        return cluster(
            folder=folder,
            script=SCRIPT,
            script_args=[
                f"--steps={STEPS}",
                f"--loss-log={folder / 'losses.txt'}",
                "--lose",
                *lose,
            ],
            procs_per_agent=NUM_RANKS,
            num_standbys=0,
            preload=["torch._dynamo"],
            launch_args=launch,
            env={"MNEMOSYNE_PROXY_DEVICE": "emulated"},
        )

    healthy = job_in(tmp_path / "healthy", [], [])
    assert healthy.wait(60) == [0], healthy.output()
    lose = [
        *("1:2:forward", "2:4:backward", "0:6:optimizer", "1:8:mutated"),
        *("2:10:between", "0:12:forward", "1:12:forward", "2:0:backward"),
        *("0:14:optimizer", "1:14:mutated", "2:16:mutated", "0:17:between"),
        *("1:18:vote", "0:20:vote", "2:21:vote"),
    ]
    job = job_in(tmp_path / "lost", lose, ["--device-proxy"])
    assert job.wait(90) == [0], job.output()
    assert_same_training(job, healthy, {})
    assert_survivors_stayed(job, {})
    assert_redone_at_most_once(job)
    assert len(job.events("device_recovered")) == len(lose), job.output()
    assert all(e.fields["links_replaced"] == 0 for e in job.events("reconfigured"))
    job.check_nothing_is_left()


@pytest.mark.timeout(120)
def test_a_device_that_the_same_step_breaks_each_time_ends_the_job(
    cluster: Job, tmp_path: Path
) -> None:
    job = cluster(
        folder=tmp_path / "job",
        script=SCRIPT,
        script_args=[f"--steps={STEPS}", "--lose", "1:3:always"],
        procs_per_agent=2,
        num_standbys=0,
        preload=["torch._dynamo"],
        launch_args=["--device-proxy"],
        env={"MNEMOSYNE_PROXY_DEVICE": "emulated"},
    )
    assert job.wait(60) == [3], job.output()
    assert "rank 1 lost its device 20 times in step 3" in job.output()
    job.check_nothing_is_left()


@pytest.mark.timeout(120)
def test_a_job_whose_devices_are_all_lost_ends_and_says_why(
    cluster: Job, tmp_path: Path
) -> None:
    lose = [f"{rank}:3:together" for rank in range(NUM_RANKS)]
    job = cluster(
        folder=tmp_path / "job",
        script=SCRIPT,
        script_args=[f"--steps={STEPS}", "--lose", *lose],
        procs_per_agent=NUM_RANKS,
        num_standbys=0,
        preload=["torch._dynamo"],
        launch_args=["--device-proxy"],
        env={"MNEMOSYNE_PROXY_DEVICE": "emulated"},
    )
    assert job.wait(60) == [3], job.output()
    assert "no rank is left that holds the state" in job.output()
    job.check_nothing_is_left()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "config",
    [pytest.param("ds_config_gpt", marks=pytest.mark.long), "ds_config_gpt_zero1"],
)
def test_deepspeed_goes_on_after_losses_in_each_phase(
    train: Job, undisturbed: Job, config: str
) -> None:
    lose = [
        *("1:1:forward", "0:2:backward", "0:3:reduce", "1:4:vote", "1:5:optimizer"),
        *("0:6:gather", "0:8:between", "1:9:optimizer", "1:9:recovery"),
    ]
    shape = {"steps": 11, "config": config, "procs_per_agent": 2}
    launch = ["--preload=deepspeed"]  # once, not in each rank
    job = train(
        **shape,
        script=SCRIPT.with_name("lose_devices_deepspeed.py"),
        num_standbys=0,
        launch_args=[*launch, "--device-proxy"],
        env=EMULATED | {"LOSE": " ".join(lose)},
    )
    assert job.wait(90) == [0], job.output()
    healthy = undisturbed(**shape, launch_args=launch, env=EMULATED)
    assert_same_training(job, healthy, {})
    assert_survivors_stayed(job, {})
    num_phases = len(lose) - ("zero" not in config)  # without a shard nothing gathers
    assert len(job.events("device_recovered")) == num_phases, job.output()
    job.check_nothing_is_left()


@pytest.mark.timeout(60)
def test_a_shard_that_is_lost_before_it_has_a_copy_ends_the_job(train: Job) -> None:
    job = train(
        steps=4,
        config="ds_config_gpt_zero1",
        procs_per_agent=2,
        script=SCRIPT.with_name("lose_devices_deepspeed.py"),
        num_standbys=0,
        launch_args=["--device-proxy", "--max-restarts=0", "--preload=deepspeed"],
        env=EMULATED | {"LOSE": "1:0:between"},
    )
    assert job.wait(50) == [3], job.output()
    assert "rank 1 lost its device before there was a copy of its shard" in job.output()
    job.check_nothing_is_left()
