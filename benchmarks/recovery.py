"""How long a job stands still when a worker is killed: Mnemosyne against torchrun.

The same workload loses the same ranks at the same steps. The clock runs from SIGKILL
until all ranks have finished a step that none had finished before. torchrun restarts
from a checkpoint that the script writes at every fifth step.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jobs import (
    BIN,
    MEGATRON_RANKS,
    NUM_RANKS,
    ROOT,
    Job,
    add_device_arguments,
    has_warm_standby,
    megatron,
    on_gpus,
    plain,
    plain_pid,
    protected,
    protected_pid,
    recovered_at,
)

SAVE_EVERY = 5
# One more than two checkpoints, so that five kills have all distances to the last one.
STEPS_BETWEEN = 11


def main() -> None:
    args = parse_args()
    if args.kills < 1:
        sys.exit("recovery.py: error: --kills must be at least 1")
    if args.device == "cuda" and args.engine != "deepspeed":
        sys.exit("recovery.py: error: on GPUs there is --engine deepspeed only")
    steps = args.first_step + args.kills * STEPS_BETWEEN
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as name:
        start = starter(args, Path(name), steps)
        job = start(True)
        ours = measure(job, args, protected_pid)
        report = [sys.executable, "-m", "mnemosyne_plugin.cli", "report", job.folder]
        subprocess.run(report, check=True)
        theirs = measure(start(False), args, plain_pid)
    print_comparison(ours, theirs)


def starter(
    args: argparse.Namespace, folder: Path, steps: int
) -> Callable[[bool], Job]:
    """Return what starts the job: under Mnemosyne, or by torchrun."""
    corpus, places = folder / "corpus", (folder / "torchrun", folder / "mnemosyne")
    checkpoints = f"--checkpoint-dir={folder / 'checkpoints'}"
    saving = (checkpoints, f"--save-every={SAVE_EVERY}")
    if args.engine == "megatron":
        prepare = ROOT / "examples" / "megatron_gpt" / "prepare.py"
        subprocess.run([BIN / "python", prepare, "--output", corpus], check=True)

    def start(is_protected: bool) -> Job:
        place = places[is_protected]
        options = () if is_protected else saving
        max_restarts = None if is_protected else args.kills
        if args.device == "cuda":
            return on_gpus(place, steps, args, *options, max_restarts=max_restarts)
        if args.engine == "megatron":
            return megatron(place, steps, corpus, *options, max_restarts=max_restarts)
        if is_protected:
            return protected(place, steps)
        return plain(place, steps, *saving, max_restarts=args.kills)

    return start


def measure(
    job: Job, args: argparse.Namespace, find: Callable[[Job, int], int]
) -> list[float]:
    """Kill one rank after the other; return the seconds of each recovery."""
    num_ranks = MEGATRON_RANKS if args.engine == "megatron" else NUM_RANKS
    if args.device == "cuda":
        num_ranks = args.ranks
    moments = random.Random(0)
    killed_at = []
    try:
        for kill in range(args.kills):
            job.wait_for_step(args.first_step + kill * STEPS_BETWEEN)
            if find is protected_pid and not has_warm_standby(job, kill):
                sys.exit("recovery.py: no standby is ready: a later --first-step")
            time.sleep(moments.uniform(0.0, 0.1))  # any moment of a step
            pid = find(job, kill % num_ranks)
            killed_at.append(time.time())
            os.kill(pid, signal.SIGKILL)
        job.wait()
    finally:
        job.close()
    lines = job.lines()
    return [recovered_at(lines, moment, num_ranks)[1] - moment for moment in killed_at]


def print_comparison(ours: list[float], theirs: list[float]) -> None:
    """Print one row per kill, and the medians with their ratio."""
    print("\n| kill | mnemosyne, s | torchrun, s |\n|---|---|---|")
    for kill, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        print(f"| {kill} | {our:.3f} | {their:.3f} |")
    our, their = statistics.median(ours), statistics.median(theirs)
    print(f"| median | {our:.3f} | {their:.3f} |")
    print(f"\ntorchrun takes {their / our:.1f} times as long")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", choices=("deepspeed", "megatron"), default="deepspeed"
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--first-step",
        type=int,
        default=48,
        help="with a kill: by then the standby has imported what the workers use",
    )
    add_device_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
