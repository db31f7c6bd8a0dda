"""What protection costs while nothing fails: the step time with and without us.

Runs the same script in turns, A B A B, so that a slow minute of the machine hits
both; each pair gives one ratio of median step times.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from jobs import Job, add_device_arguments, on_gpus, plain, protected, step_ms

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
            places = Path(name, f"plain-{pair}"), Path(name, f"mnemosyne-{pair}")
            without = step_ms(start(places[0], args, False), WARM_UP_STEPS)
            with_us = step_ms(start(places[1], args, True), WARM_UP_STEPS)
            pairs.append((without, with_us))
            ratio = with_us / without
            print(f"| {pair + 1} | {without:.1f} | {with_us:.1f} | {ratio:.3f} |")
    without, with_us = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"| median | {without:.1f} | {with_us:.1f} | {ratio:.3f} |")


def start(place: Path, args: argparse.Namespace, is_protected: bool) -> Job:
    """Start one of both jobs."""
    if args.device == "cuda":
        return on_gpus(
            place, args.steps, args, max_restarts=None if is_protected else 0
        )
    return (protected if is_protected else plain)(place, args.steps)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=140)
    add_device_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
