"""Jobs of two kinds: under Mnemosyne, and plain under torchrun.

On the CPU they are the examples; on GPUs, train_on_gpus.py.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mnemosyne_plugin.events import read_events

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TRAIN = ROOT / "examples" / "deepspeed_gpt" / "train.py"
CONFIGS = ROOT / "configs"
NUM_RANKS = 4
MEGATRON_RANKS = 8
SETTINGS = {
    # Four ranks share few cores: more threads would only make both kinds slower.
    "OMP_NUM_THREADS": "1",
    # Else torchrun 2.13 lends its rendezvous store to the workers, and a restarted
    # gloo job dials the addresses that the dead attempt had left there.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
ON_CPU = {"DS_ACCELERATOR": "cpu"}
# Without the device proxy our groups move the tensors of devices where they are told.
ON_GPUS = {"DS_ACCELERATOR": "cuda", "MNEMOSYNE_DEVICE_GROUPS": "nccl"}
DEADLINE_S = 600
POLL_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Line:
    """One finished step of one rank."""

    step: int
    rank: int
    time_s: float


class Job:
    """A running job that writes a time stamp per finished step and rank."""

    def __init__(
        self, folder: Path, command: list[str], variables: Mapping[str, str] = ON_CPU
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._output = (folder / "output.txt").open("wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SETTINGS, **variables},
        )
        self._deadline = time.monotonic() + DEADLINE_S

    def lines(self) -> list[Line]:
        """Return what has been finished so far, in the order of the file."""
        path = time_log(self.folder)
        if not path.exists():
            return []
        rows = (row.split() for row in path.read_text().splitlines())
        return [Line(step=int(s), rank=int(r), time_s=float(t)) for s, r, t in rows]

    def wait_for_step(self, step: int) -> None:
        """Return as soon as some rank has finished a step."""
        while all(line.step < step for line in self.lines()):
            self._check()
            time.sleep(POLL_S)

    def wait(self) -> None:
        """Wait for the good end of the job."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(self._deadline - time.monotonic(), 0))
        if self._process.poll() != 0:
            self._fail(f"ended with {self._process.poll()}")

    def close(self) -> None:
        """End the job if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)
        self._output.close()

    def _check(self) -> None:
        if self._process.poll() is not None:
            self._fail(f"ended too early with {self._process.poll()}")
        if time.monotonic() > self._deadline:
            self._fail(f"did not end in {DEADLINE_S} s")

    def _fail(self, what: str) -> None:
        tail = (self.folder / "output.txt").read_text(errors="replace")[-4000:]
        self.close()
        raise SystemExit(f"{tail}\n{self.folder.name}: the job {what}")


def time_log(folder: Path) -> Path:
    return folder / "times.txt"


def protected(
    folder: Path,
    steps: int,
    config: Path = CONFIGS / "ds_config_gpt.json",
    num_standbys: int = 1,
) -> Job:
    """Start the example under `mnemosyne run`."""
    command = [str(BIN / "mnemosyne"), "run", "--standalone"]
    command += [f"--nproc-per-node={NUM_RANKS}", f"--standby={num_standbys}"]
    command += [f"--run-dir={folder}", str(TRAIN), f"--deepspeed_config={config}"]
    return Job(folder, command + _log_args(folder, steps))


def plain(folder: Path, steps: int, *options: str, max_restarts: int = 0) -> Job:
    """Start the example as DeepSpeed users do: torchrun and gloo, without us."""
    command = [str(BIN / "torchrun"), "--standalone"]
    command += [f"--nproc-per-node={NUM_RANKS}", f"--max-restarts={max_restarts}"]
    command += [str(Path(__file__).with_name("plain_train.py"))]
    command += [f"--deepspeed_config={CONFIGS / 'ds_config_gpt_plain.json'}", *options]
    return Job(folder, command + _log_args(folder, steps))


def megatron(
    folder: Path, steps: int, corpus: Path, *options: str, max_restarts: int | None
) -> Job:
    """Start the example of Megatron, TP 2 x PP 2 x DP 2.

    max_restarts: under torchrun, which may restart so often; None: `mnemosyne run`.
    """
    if max_restarts is None:
        command = [str(BIN / "mnemosyne"), "run", "--standby=1", f"--run-dir={folder}"]
        script = ROOT / "examples" / "megatron_gpt" / "train_core.py"
    else:
        command = [str(BIN / "torchrun"), f"--max-restarts={max_restarts}"]
        script = Path(__file__).with_name("plain_megatron.py")
    command += ["--standalone", f"--nproc-per-node={MEGATRON_RANKS}", str(script)]
    command += ["--tensor=2", "--pipeline=2", f"--data={corpus}", *options]
    return Job(folder, command + _log_args(folder, steps))


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Let the user choose GPUs, and what is trained there."""
    gpus = parser.add_argument_group("on GPUs")
    gpus.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    gpus.add_argument("--ranks", type=int, default=2, help="more than GPUs share them")
    gpus.add_argument("--device-proxy", action="store_true", help="ours under it")
    gpus.add_argument(
        "script_args", nargs="*", metavar="-- ARG", help="of train_on_gpus.py"
    )


def on_gpus(
    folder: Path,
    steps: int,
    args: argparse.Namespace,
    *options: str,
    max_restarts: int | None,
) -> Job:
    """Start the workload on GPUs.

    max_restarts: under torchrun, which may restart so often; None: `mnemosyne run`.
    """
    command = [sys.executable, "-m"]
    variables = dict(ON_GPUS)
    if max_restarts is None:
        command += ["mnemosyne_plugin.cli", "run", "--standby=1", f"--run-dir={folder}"]
        options = ("--protected", *options)
        if args.device_proxy:
            command.append("--device-proxy")
            del variables["MNEMOSYNE_DEVICE_GROUPS"]
    else:
        command += ["torch.distributed.run", f"--max-restarts={max_restarts}"]
    command += ["--standalone", f"--nproc-per-node={args.ranks}"]
    command += [str(Path(__file__).with_name("train_on_gpus.py")), *options]
    command += args.script_args
    return Job(folder, command + _log_args(folder, steps), variables)


def has_warm_standby(job: Job, num_used: int) -> bool:
    """Whether there is another standby that has imported what workers use."""
    names = [event.name for event in read_events(job.folder)]
    since = names.index("protected") if "protected" in names else len(names)
    return names[since:].count("worker_ready") > num_used


def _log_args(folder: Path, steps: int) -> list[str]:
    return [f"--steps={steps}", f"--time-log={time_log(folder)}"]


def protected_pid(job: Job, rank: int) -> int:
    """Return the process that holds a rank under `mnemosyne run`."""
    seated = [e for e in read_events(job.folder) if e.name == "seated"]
    return [e.fields["pid"] for e in seated if e.fields["rank"] == rank][-1]


def plain_pid(job: Job, rank: int) -> int:
    """Return the process that holds a rank under torchrun, by its environment."""
    mine = f"--time-log={time_log(job.folder)}".encode()
    wanted = f"RANK={rank}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mine not in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                continue
            if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                return int(name)
    raise SystemExit(f"no process of rank {rank}")


def recovered_at(
    lines: list[Line], killed_at: float, num_ranks: int = NUM_RANKS
) -> tuple[int, float]:
    """Return the step, and when all ranks had finished it, that ended a recovery.

    It is the first step that no rank had finished before the kill. A rank whose log
    line died with it is not counted for that step: the next one is.
    """
    newest = max(line.step for line in lines if line.time_s < killed_at)
    times: dict[int, dict[int, float]] = defaultdict(dict)
    for line in lines:
        if line.time_s > killed_at and line.step > newest:
            times[line.step].setdefault(line.rank, line.time_s)
    step = min(s for s, of_ranks in times.items() if len(of_ranks) == num_ranks)
    return step, max(times[step].values())


def step_ms(job: Job, warm_up_steps: int) -> float:
    """Wait for the job; return its median time of a step behind the warm-up.

    By the time stamps of rank 0.
    """
    try:
        job.wait()
    finally:
        job.close()
    times = [line.time_s for line in job.lines() if line.rank == 0][warm_up_steps:]
    steps = (after - before for before, after in pairwise(times))
    return 1e3 * statistics.median(steps)
