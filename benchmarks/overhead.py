"""What protection costs while nothing fails: the step time with and without us.

Runs the same script in turns, A B A B, so that a slow minute of the machine hits
both; each pair gives one ratio of median step times.
"""

import argparse
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from jobs import Job, plain, protected

WARM_UP_STEPS = 40
"""Meanwhile the standby imports what the workers use, which takes a core."""


def main() -> None:
    args = parse_args()
    if args.steps <= WARM_UP_STEPS + 1 or args.pairs < 1:
        sys.exit(
            f"overhead.py: error: needs a pair, and over {WARM_UP_STEPS + 1} steps"
        )
    print("| pair | plain, ms | mnemosyne, ms | ratio |\n|---|---|---|---|")
    pairs = []
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as name:
        for pair in range(args.pairs):
            without = step_ms(plain(Path(name, f"plain-{pair}"), args.steps))
            with_us = step_ms(protected(Path(name, f"mnemosyne-{pair}"), args.steps))
            pairs.append((without, with_us))
            ratio = with_us / without
            print(f"| {pair + 1} | {without:.1f} | {with_us:.1f} | {ratio:.3f} |")
    without, with_us = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"| median | {without:.1f} | {with_us:.1f} | {ratio:.3f} |")


def step_ms(job: Job) -> float:
    """Return the median time of a step, by the time stamps of rank 0."""
    try:
        job.wait()
    finally:
        job.close()
    times = [line.time_s for line in job.lines() if line.rank == 0][WARM_UP_STEPS:]
    steps = (after - before for before, after in pairwise(times))
    return 1e3 * statistics.median(steps)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=140)
    return parser.parse_args()


if __name__ == "__main__":
    main()
