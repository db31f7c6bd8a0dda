"""What protection costs while nothing fails: the step time with and without us.

Runs the same script in turns, A B A B, so that a slow minute of the machine hits
both; each pair gives one ratio of median step times.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from jobs import plain, protected, step_ms

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
            theirs = plain(Path(name, f"plain-{pair}"), args.steps)
            without = step_ms(theirs, WARM_UP_STEPS)
            ours = protected(Path(name, f"mnemosyne-{pair}"), args.steps)
            with_us = step_ms(ours, WARM_UP_STEPS)
            pairs.append((without, with_us))
            ratio = with_us / without
            print(f"| {pair + 1} | {without:.1f} | {with_us:.1f} | {ratio:.3f} |")
    without, with_us = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"| median | {without:.1f} | {with_us:.1f} | {ratio:.3f} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=140)
    return parser.parse_args()


if __name__ == "__main__":
    main()
