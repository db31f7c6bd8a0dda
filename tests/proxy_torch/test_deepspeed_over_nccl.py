"""DeepSpeed over NCCL, by torch's CUDA build: ranks lose devices, and workers die."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from under_proxy import Job, needs_torch, train

pytestmark = [needs_torch, pytest.mark.timeout(600)]
NUM_STEPS = 12
KILLS = ["kill rank=1 step=4 phase=forward", "kill rank=0 step=8 phase=vote"]
# Within as many commands servers die. A step without a shard in bf16 takes more.
WAYS = [(0, "fp32", 900), (1, "fp32", 900), (2, "fp32", 900), (0, "bf16", 3000)]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"zero{way[0]}-{way[1]}")
def way(request: pytest.FixtureRequest) -> list[str]:
    stage, dtype, within = request.param
    return [f"--stage={stage}", f"--dtype={dtype}", f"--kill-within={within}"]


def train_deepspeed(
    folder: Path, *args: str, chaos: Sequence[str] = (), **variables: str
) -> Job:
    return train(
        "train_deepspeed.py",
        folder,
        *args,
        device_timeout_s=None,  # it is in the ds_config
        preload="deepspeed",  # the nursery imports it, which counts devices
        chaos=chaos,
        **variables,
    )


@pytest.fixture(scope="module")
def undisturbed(way: list[str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train_deepspeed(tmp_path_factory.mktemp("undisturbed"), *way)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_device_dies_at_random_commands_changes_nothing(
    way: list[str], undisturbed: Job, tmp_path: Path, victim: int
) -> None:
    job = train_deepspeed(tmp_path, *way, f"--victim={victim}")
    assert job.lines == undisturbed.lines
    assert len(job.lines) == 2 * NUM_STEPS + 2  # and a hash of each rank
    assert set(job.num_recoveries) == {victim}
    assert job.num_recoveries[victim] > 6
    assert len(job.pids) == len(job.groups) == 2


def test_a_device_that_hangs_is_replaced_and_others_are_not(
    way: list[str], undisturbed: Job, tmp_path: Path
) -> None:
    hang = ("--victim=1", "--fault=hang", "--kill-within=4000")
    job = train_deepspeed(tmp_path, *way, *hang)
    assert job.lines == undisturbed.lines
    assert set(job.num_recoveries) == {1}
    assert len(job.pids) == len(job.groups) == 2
    assert set(job.ranks_that_hung) == {1}


def test_workers_that_die_are_replaced_over_nccl(
    way: list[str], undisturbed: Job, tmp_path: Path
) -> None:
    job = train_deepspeed(tmp_path, *way, chaos=KILLS)
    assert job.lines == undisturbed.lines
    assert sorted(rank for rank, _ in job.pids) == [0, 0, 1, 1]


# As on a GPU: our groups, and NCCL below them.
@pytest.mark.parametrize(
    "program, options",
    [
        ("train_deepspeed.py", ["--plain", "--stage=3"]),
        ("train_deepspeed.py", ["--plain", "--experts"]),
        ("train_pipeline.py", []),
        ("train_pipeline.py", ["--stage=1", "--dtype=bf16"]),
    ],
    ids=["zero3", "experts", "pipeline", "pipeline-zero1-bf16"],
)
def test_without_the_proxys_recovery_workers_that_die_are_replaced_too(
    tmp_path: Path, program: str, options: list[str]
) -> None:
    def job(name: str, *chaos: str) -> Job:
        return train(
            program,
            tmp_path / name,
            *options,
            device_timeout_s=None,
            preload="deepspeed",
            chaos=chaos,
            MNEMOSYNE_DEVICE_GROUPS="nccl",
        )

    undisturbed, killed = job("undisturbed"), job("killed", *KILLS)
    assert killed.lines == undisturbed.lines
    assert len(killed.lines) == 2 * NUM_STEPS + 2
    assert sorted(rank for rank, _ in killed.pids) == [0, 0, 1, 1]
    assert len(killed.groups) <= 4  # each worker has had the same ones all the time
