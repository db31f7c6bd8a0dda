"""DDP over NCCL, by torch's CUDA build: ranks lose devices, and workers die."""

from pathlib import Path

import pytest
from under_proxy import Job, needs_torch, train

pytestmark = [needs_torch, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train("train_ddp.py", tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_device_dies_at_random_commands_changes_nothing(
    undisturbed: Job, tmp_path: Path, victim: int
) -> None:
    job = train("train_ddp.py", tmp_path, f"--victim={victim}")
    assert job.lines == undisturbed.lines
    assert len(job.lines) == 28  # of each rank 12 steps, a hash, and the memory in use
    assert set(job.num_recoveries) == {victim}
    assert job.num_recoveries[victim] > 10
    assert len(job.pids) == len(job.groups) == 2
    assert job.received
    assert all(size == carried for size, carried in job.received)


def test_a_device_that_hangs_is_replaced_and_others_are_not(
    undisturbed: Job, tmp_path: Path
) -> None:
    hang = ("--victim=1", "--fault=hang", "--kill-within=4000")
    job = train("train_ddp.py", tmp_path, *hang)
    assert job.lines == undisturbed.lines
    assert set(job.num_recoveries) == {1}
    assert len(job.pids) == len(job.groups) == 2
    assert set(job.ranks_that_hung) == {1}


def test_workers_that_die_are_replaced_over_nccl(
    undisturbed: Job, tmp_path: Path
) -> None:
    kills = [(1, 2, "data"), (0, 4, "forward"), (1, 6, "vote"), (0, 8, "vote")]
    chaos = [
        f"kill rank={rank} step={step} phase={phase}" for rank, step, phase in kills
    ]
    job = train("train_ddp.py", tmp_path, chaos=chaos)
    assert job.lines == undisturbed.lines
    assert sorted(rank for rank, _ in job.pids) == [0, 0, 0, 1, 1, 1]
    assert len(job.groups) <= 6  # each worker has had the same ones all the time
    assert len(job.received) == 4
    assert all(size == carried > 0 for size, carried in job.received)


@pytest.fixture(scope="module")
def undisturbed_of_three(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train("train_ddp.py", folder, num_ranks=3)


def test_a_group_without_the_lost_rank_keeps_its_communicator(
    undisturbed_of_three: Job, tmp_path: Path
) -> None:
    chaos = ["kill rank=2 step=4 phase=forward"]
    job = train("train_ddp.py", tmp_path, num_ranks=3, chaos=chaos)
    assert job.lines == undisturbed_of_three.lines
    assert sorted(rank for rank, _ in job.pids) == [0, 1, 2, 2]
    assert sorted(job.kept) == [0, 1, 1]


def test_workers_die_while_another_rank_loses_its_device(
    undisturbed_of_three: Job, tmp_path: Path
) -> None:
    # The third rank holds the state where both are lost at once.
    chaos = ["kill rank=0 step=5 phase=forward", "kill rank=0 step=9 phase=vote"]
    victim = ("--victim=1", "--kill-within=3000")
    job = train("train_ddp.py", tmp_path, *victim, num_ranks=3, chaos=chaos)
    assert job.lines == undisturbed_of_three.lines
    assert set(job.num_recoveries) == {1}
    assert sorted(rank for rank, _ in job.pids) == [0, 0, 0, 1, 2]


# Who sees it first: the rank that waits for its device, or NCCL's watchdog.
@pytest.mark.parametrize("device_timeout_s, timeout_s", [(2, 600), (300, 4)])
def test_a_communicator_that_hangs_costs_no_server(
    undisturbed: Job, tmp_path: Path, device_timeout_s: int, timeout_s: int
) -> None:
    job = train(
        "train_ddp.py",
        tmp_path,
        f"--timeout={timeout_s}",
        device_timeout_s=device_timeout_s,
        MNEMOSYNE_EMULATED="fault=stalled_communicator,at=11",
    )
    assert job.lines == undisturbed.lines
    assert not job.num_recoveries and not job.ranks_that_hung
    assert len(job.pids) == len(job.groups) == 2
    assert job.kept


def test_operations_that_were_waited_for_hold_no_memory(tmp_path: Path) -> None:
    # The host is ahead of the device by all of them.
    job = train("held.py", tmp_path)
    held = {name: float(size) for name, size in map(str.split, job.lines)}
    assert held.keys() == {"reduce", "reduce_later", "gather", "exchange"}
    assert max(held.values()) <= 2.0
