"""Megatron-LM's own ``pretrain`` (a wheel of PyPI, see Makefile), on the CPU."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from cluster import LocalCluster
from matrix.runs import assert_each_step_was_logged, first_difference
from verdict import assert_survivors_stayed

HARNESS = Path(__file__).resolve().parents[1] / "megatron"
VERSION = "0.17.0"
MEGATRON_LM = Path(sys.prefix) / f"megatron-lm-{VERSION}"
PATCH = Path(__file__).resolve().parents[2] / "patches/megatron-lm" / f"{VERSION}.patch"
ITERATIONS = 18
ARGUMENTS = """
--tensor-model-parallel-size 2 --num-layers 2 --hidden-size 32
--num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
--micro-batch-size 2 --global-batch-size 8 --bf16 --lr 1e-2 --min-lr 1e-4
--lr-decay-style cosine --lr-warmup-iters 1 --overlap-grad-reduce
--transformer-impl local
--distributed-backend gloo --tokenizer-type NullTokenizer --vocab-size 63
--make-vocab-size-divisible-by 8 --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
--no-persist-layer-norm --no-rope-fusion --num-workers 0 --log-interval 1
--eval-interval 5 --eval-iters 1 --save-interval 3 --ckpt-format torch
""".split()  # noqa: SIM905
GIVEN_UP = "a checkpoint was due or under way: it is given up"
Job = Callable[..., LocalCluster]


def pretrain(
    cluster: Job,
    folder: Path,
    *args: str,
    chaos: Sequence[str] = (),
    num_ranks: int = 4,
    env: Mapping[str, str] = {},  # noqa: B006
) -> LocalCluster:
    path = [str(MEGATRON_LM), str(HARNESS), os.environ.get("PYTHONPATH", "")]
    return cluster(
        folder=folder,
        script=HARNESS / "pretrain_gpt.py",
        script_args=[*ARGUMENTS, f"--train-iters={ITERATIONS}", *args],
        procs_per_agent=num_ranks,
        chaos=chaos,
        preload=["torch._dynamo", "cpu_cuda", "megatron.training"],
        env={
            "LOSS_LOG": str(folder / "losses.txt"),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            **env,
        },
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pretrain_survives_saves_when_told_to_end_and_resumes(
    cluster: Job, tmp_path: Path
) -> None:
    healthy = pretrain(cluster, tmp_path / "healthy")
    assert healthy.wait(100) == [0], healthy.output()
    healthy.check_nothing_is_left()

    checkpoints = tmp_path / "checkpoints"
    chaos = [
        "kill rank=1 step=2 phase=forward nth=2",
        "kill rank=1 step=5 phase=forward nth=2",  # of the evaluation in front of it
        "kill rank=2 step=6 phase=save",
        "kill rank=3 step=9 phase=mid-optimizer",
        "kill rank=0 step=11 phase=norm",
    ]
    save = f"--save={checkpoints}"
    job = pretrain(cluster, tmp_path / "killed", "--mnemosyne", save, chaos=chaos)
    job.wait_for_step(12, timeout_s=100)
    job.agents[0].send_signal(signal.SIGTERM)
    assert job.wait(60) == [128 + signal.SIGTERM], job.output()
    check(job, chaos)
    last = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert f"saved: {checkpoints}/iter_{last:07d}" in job.output()
    for what in (GIVEN_UP, "an evaluation was due or under way: it is given up"):
        assert what in job.output()

    chaos = [
        f"kill rank=2 step={ITERATIONS - last - 2} phase=norm",
        # Of the evaluation behind the last step.
        f"kill rank=1 step={ITERATIONS - last} phase=forward nth=2",
    ]
    load = [f"--load={checkpoints}", "--mnemosyne", "--mnemosyne-buddies=2"]
    rest = pretrain(cluster, tmp_path / "rest", *load, chaos=chaos)
    assert rest.wait(100) == [0], rest.output()
    check(rest, chaos)
    # On the same data, though an earlier one was given up.
    assert validation_loss(rest, 15) == validation_loss(healthy, 15)

    both = tmp_path / "losses.txt"
    both.write_text(job.loss_log.read_text() + rest.loss_log.read_text())
    rest.loss_log = both
    assert first_difference(rest, healthy) is None
    deaths = [e.fields["rank"] for each in (job, rest) for e in each.events("fault")]
    assert_each_step_was_logged(rest, healthy, Counter(deaths))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_torch_dist_checkpoint_is_given_up_while_another_process_writes_it_too(
    cluster: Job, tmp_path: Path
) -> None:
    def job(name: str, *args: str, chaos: Sequence[str], **options: Any) -> Any:
        common = "--mnemosyne --ckpt-format torch_dist --tensor-model-parallel-size 1"
        common += f" --train-iters 9 --eval-interval 100 --save={tmp_path / name}"
        folder, args = tmp_path / f"job_{name}", (*common.split(), *args)
        options |= {"num_ranks": 2, "chaos": chaos}
        job = pretrain(cluster, folder, *args, **options)
        assert job.wait(180) == [0], job.output()
        check(job, chaos)
        return job

    first = job("first", "--save-interval=3", chaos=["kill rank=0 step=6 phase=save"])
    assert whole_checkpoints(first) == [3, 9]
    assert first.output().count(GIVEN_UP) == 1

    chaos = [
        "kill rank=1 step=2 phase=forward",  # while that of iteration 4 is written
        "kill rank=0 step=5 phase=save-ask",  # whether that of iteration 8 is
        "kill rank=1 step=6 phase=save-end",  # behind the last step: written again
    ]
    os.mkfifo(held := tmp_path / "iter_0000004")
    load = [f"--load={tmp_path / 'first'}", "--ckpt-step=3", "--save-interval=4"]
    load += ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy=mcore"]
    rest = job("rest", *load, chaos=chaos, env={"HELD_SAVE": str(held)})
    assert whole_checkpoints(rest) == [9]
    assert rest.output().count(GIVEN_UP) == 2
    tracker = tmp_path / "rest" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "9"

    assert first_difference(rest, first) is None
    last = [tensors(tmp_path / name / "iter_0000009") for name in ("first", "rest")]
    assert last[0] == last[1]


def whole_checkpoints(job: LocalCluster) -> list[int]:
    said = r"successfully saved checkpoint from iteration +(\d+)"
    return [int(number) for number in re.findall(said, job.output())]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Return what a torch_dist checkpoint has of each tensor."""
    state = _load_state_dict_from_keys(checkpoint_id=checkpoint)
    return {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def validation_loss(job: LocalCluster, iteration: int) -> str:
    asked = f"validation loss at iteration {iteration} |"
    (line,) = [line for line in job.output().splitlines() if asked in line]
    return line


def check(job: LocalCluster, chaos: Sequence[str]) -> None:
    deaths = Counter(event.fields["rank"] for event in job.events("fault"))
    assert deaths.total() == len(chaos)
    assert_survivors_stayed(job, deaths)
    # A killed process leaves these of its helpers, under any launcher.
    for folder in (job.folder / "tmp").glob("pymp-*"):
        shutil.rmtree(folder)
    job.check_nothing_is_left()


def test_a_patched_source_tree_needs_no_import_hook(tmp_path: Path) -> None:
    shutil.copytree(MEGATRON_LM / "megatron", tmp_path / "megatron")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "apply", str(PATCH)], check=True)
    asked = """
import sys, cpu_cuda
from megatron.training import arguments, training
sys.argv += ["--mnemosyne"]
print(training._has_mnemosyne)
try:
    arguments.parse_args()
except Exception as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), str(HARNESS)])
    env = {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", asked]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "True\n" in result.stdout, result.stderr
    assert "not started by `mnemosyne run`" in result.stdout, result.stderr
