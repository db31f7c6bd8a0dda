"""A worker of a DeepSpeed job is killed, and nobody can tell from the result."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import LocalCluster
from verdict import assert_only_links_of_the_dead_were_replaced, assert_survived

STEPS = 40
PHASES = ("data", "forward", "backward", "reduce", "vote", "optimizer", "between")
PAUSE = Path(__file__).parent / "scripts" / "pause_at_step.py"
Job = Callable[..., LocalCluster]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("rank", [0])  # the others: test_matrix.py
def test_a_rank_killed_in_each_phase_of_a_step_loses_nothing(
    rank: int, train: Job, undisturbed: Job
) -> None:
    chaos = [
        f"kill rank={rank} step={4 + 5 * index} phase={phase}"
        for index, phase in enumerate(PHASES)
    ]
    job = train(steps=STEPS, chaos=chaos)
    assert job.wait(150) == [0], job.output()
    assert [e.fields["phase"] for e in job.events("fault")] == list(PHASES)
    assert_survived(job, undisturbed(steps=STEPS), {rank: len(PHASES)})
    assert_only_links_of_the_dead_were_replaced(job)


@pytest.mark.timeout(120)
def test_two_kills_one_right_after_the_other(train: Job, undisturbed: Job) -> None:
    chaos = [
        "kill rank=1 step=10 phase=backward",
        "kill rank=2 step=10 phase=backward delay_ms=5",
    ]
    job = train(steps=STEPS, num_standbys=2, chaos=chaos)
    assert job.wait(90) == [0], job.output()
    assert_survived(job, undisturbed(steps=STEPS), {1: 1, 2: 1})


@pytest.mark.timeout(120)
def test_a_kill_while_all_ranks_are_idle_between_steps(
    train: Job, undisturbed: Job, tmp_path: Path
) -> None:
    job = train(steps=16, script=PAUSE, env={"PAUSE_DIR": str(tmp_path)})
    job.wait_until(lambda _: len(list(tmp_path.glob("paused.*"))) == 4)
    job.kill(2)
    job.wait_until(lambda job: len(job.pids(2)) == 2)
    (tmp_path / "go").touch()
    assert job.wait(60) == [0], job.output()
    assert_survived(job, undisturbed(steps=16), {2: 1})


@pytest.mark.timeout(120)
def test_without_a_standby_a_fresh_worker_takes_the_rank(
    train: Job, undisturbed: Job
) -> None:
    job = train(
        steps=STEPS, num_standbys=0, chaos=["kill rank=3 step=20 phase=forward"]
    )
    assert job.wait(90) == [0], job.output()
    assert_survived(job, undisturbed(steps=STEPS), {3: 1})


@pytest.mark.timeout(120)
@pytest.mark.long
def test_bf16_with_its_fp32_copies_comes_back_bit_for_bit(
    train: Job, undisturbed: Job
) -> None:
    chaos = [
        "kill rank=0 step=8 phase=reduce",
        "kill rank=2 step=16 phase=optimizer",
    ]
    job = train(steps=24, config="ds_config_gpt_bf16", chaos=chaos)
    assert job.wait(90) == [0], job.output()
    healthy = undisturbed(steps=24, config="ds_config_gpt_bf16")
    assert_survived(job, healthy, {0: 1, 2: 1})


@pytest.mark.timeout(120)
def test_a_worker_of_the_second_agent_is_replaced_by_that_agent(
    train: Job, undisturbed: Job
) -> None:
    job = train(
        steps=STEPS,
        num_agents=2,
        procs_per_agent=2,
        chaos=["kill rank=3 step=12 phase=backward"],
    )
    assert job.wait(90) == [0, 0], job.output()
    assert_survived(job, undisturbed(steps=STEPS), {3: 1})
    assert_only_links_of_the_dead_were_replaced(job)
