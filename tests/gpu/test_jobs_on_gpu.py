"""Whole jobs lose their device, and workers, and end with the same losses and state."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from figures import Figures
from on_gpu import IS_EMULATED, needs_gpu, run
from under_proxy import Job, train

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

WAYS = {
    "DDP": ("train_ddp.py", [], "torch"),
    "DeepSpeed, ZeRO 1": ("train_deepspeed.py", ["--stage=1"], "deepspeed"),
    "megatron.core": ("train_megatron.py", ["--distributed-optimizer"], "torch"),
}
CHAOS = ["kill rank=1 step=4 phase=forward", "kill rank=0 step=8 phase=vote"]
ON_DEVICE = {} if IS_EMULATED else {"MNEMOSYNE_PROXY_DEVICE": ""}


@cache
def facts() -> dict[str, str]:
    """Return NCCL's version and which trainers there are, each with "yes" or "no"."""
    done = run("facts.py", on_proxy=False)
    return {key: done.values(key)[0] for key in ("nccl", "deepspeed", "megatron")}


def job(way: str, folder: Path, *args: str, chaos: Sequence[str] = ()) -> Job:
    """Run it on two ranks, which share a GPU."""
    program, own, preload = WAYS[way]
    trainer = "megatron" if "megatron" in program else preload
    if facts().get(trainer) == "no":
        pytest.skip(f"{trainer} is not installed")
    version = tuple(map(int, facts()["nccl"].split(".")))
    if version < (2, 30) and not IS_EMULATED:
        pytest.skip(f"NCCL {version} takes one rank per GPU; 2.30 takes more")
    return train(
        program,
        folder,
        *own,
        *args,
        preload=preload,
        device_timeout_s=None if preload == "deepspeed" else 60,
        NCCL_MULTI_RANK_GPU_ENABLE="1",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        chaos=chaos,
        **ON_DEVICE,
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_job_loses_a_device(figures: Figures, tmp_path: Path, way: str) -> None:
    undisturbed = job(way, tmp_path / "undisturbed")
    lost = job(way, tmp_path / "lost", "--victim=0")
    figures.add(f"{way}: devices lost", lost.num_recoveries[0])
    assert lost.lines == undisturbed.lines
    assert lost.num_recoveries[0] >= 3
    assert len(lost.pids) == len(lost.groups) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_job_loses_workers(figures: Figures, tmp_path: Path, way: str) -> None:
    undisturbed = job(way, tmp_path / "undisturbed")
    killed = job(way, tmp_path / "killed", chaos=CHAOS)
    figures.add(f"{way}: bytes received from devices", killed.received)
    assert killed.lines == undisturbed.lines
    assert sorted(rank for rank, _ in killed.pids) == [0, 0, 1, 1]
