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
    megatron,
    plain,
    plain_pid,
    protected,
    protected_pid,
    recovered_at,
)

SAVE_EVERY = 5
# By then the standby has imported what the workers use. 11 is one more than two
# checkpoints, so that five kills have all distances to the last one.
FIRST_STEP, STEPS_BETWEEN = 48, 11


def main() -> None:
    args = parse_args()
    if args.kills < 1:
        sys.exit("recovery.py: error: --kills must be at least 1")
    kills, steps = args.kills, FIRST_STEP + args.kills * STEPS_BETWEEN
    is_megatron = args.engine == "megatron"
    num_ranks = MEGATRON_RANKS if is_megatron else NUM_RANKS
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as name:
        folder = Path(name)
        corpus, places = folder / "corpus", (folder / "mnemosyne", folder / "torchrun")
        checkpoints = f"--checkpoint-dir={folder / 'checkpoints'}"
        options = (checkpoints, f"--save-every={SAVE_EVERY}")
        if is_megatron:
            prepare = ROOT / "examples" / "megatron_gpt" / "prepare.py"
            subprocess.run([BIN / "python", prepare, "--output", corpus], check=True)
            job = megatron(places[0], steps, corpus, max_restarts=None)
        else:
            job = protected(places[0], steps)
        ours = measure(job, protected_pid, kills, num_ranks)
        subprocess.run([BIN / "mnemosyne", "report", job.folder], check=True)
        if is_megatron:
            job = megatron(places[1], steps, corpus, *options, max_restarts=kills)
        else:
            job = plain(places[1], steps, *options, max_restarts=kills)
        theirs = measure(job, plain_pid, kills, num_ranks)
    print_comparison(ours, theirs)


def measure(
    job: Job, find: Callable[[Job, int], int], kills: int, num_ranks: int
) -> list[float]:
    """Kill one rank after the other; return the seconds of each recovery."""
    moments = random.Random(0)
    killed_at = []
    try:
        for kill in range(kills):
            job.wait_for_step(FIRST_STEP + kill * STEPS_BETWEEN)
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
    return parser.parse_args()


if __name__ == "__main__":
    main()
