"""What buddy snapshots cost while nothing fails, and how many bytes they move.

Runs the example with ZeRO 1, 2 and 3 under `mnemosyne run` in turns, A B A B:
redundancy "none", which leaves the trainer untouched, and "auto".
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from jobs import CONFIGS, NUM_RANKS, ROOT, TRAIN, protected, step_ms
from mnemosyne_plugin.events import read_events

sys.path.insert(0, str(TRAIN.parent))
from model import GPT, GPTConfig  # noqa: E402

STAGES = (1, 2, 3)
# In the first ten seconds the nursery imports what workers use, on a core of theirs.
WARM_UP_STEPS = 120
BYTES_PER_PARAMETER = 12  # an fp32 master and the two moments of Adam
RESULT = ROOT / "benchmarks" / "results" / "snapshot_2cores_2026-11-24.md"


def main() -> None:
    args = parse_args()
    if args.steps <= WARM_UP_STEPS + 1 or args.pairs < 1:
        sys.exit(
            f"snapshot.py: error: needs a pair, and over {WARM_UP_STEPS + 1} steps"
        )
    parameters = sum(p.numel() for p in GPT(GPTConfig()).parameters())
    least = parameters * BYTES_PER_PARAMETER / NUM_RANKS
    table = [
        "| ZeRO | off, ms | on, ms | ratio (of each pair) | sent per step and rank, kB "
        "| least possible, kB |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as name:
        for stage in STAGES:
            table.append(row(Path(name), stage, args.pairs, args.steps, least))
            print(table[-1], flush=True)
    if args.write:
        RESULT.write_text(report(table, args))


def row(folder: Path, stage: int, num_pairs: int, steps: int, least: float) -> str:
    """Run the pairs of one stage; return its line of the table."""
    pairs, sent = [], []
    for pair in range(num_pairs):
        times = []
        for redundancy in ("none", "auto"):
            place = folder / f"zero{stage}-{pair}-{redundancy}"
            place.mkdir()
            job = protected(
                place / "run", steps, config(place, stage, redundancy), num_standbys=0
            )
            times.append(step_ms(job, WARM_UP_STEPS))
            sent += [
                event.fields["sent_bytes"]
                for event in read_events(place / "run")
                if event.name == "snapshot"
            ]
        pairs.append(times)
    off, on = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [with_us / without for without, with_us in pairs]
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return (
        f"| {stage} | {off:.1f} | {on:.1f} | {statistics.median(ratios):.3f} ({each}) "
        f"| {statistics.mean(sent) / 1e3:.1f} | {least / 1e3:.1f} |"
    )


def config(folder: Path, stage: int, redundancy: str) -> Path:
    """Write the example's ds_config for this stage."""
    values = json.loads((CONFIGS / "ds_config_gpt.json").read_text())
    values["zero_optimization"] = {"stage": stage}
    values["mnemosyne"] = {"redundancy": redundancy}
    path = folder / "ds_config.json"
    path.write_text(json.dumps(values))
    return path


def report(table: list[str], args: argparse.Namespace) -> str:
    """Return the result file."""
    head = (
        "# Buddy snapshots in a healthy step, 2026-11-24\n\nTwo cores, no GPU; four "
        "ranks on one host, one buddy each, a snapshot each step; torch 2.13.0 (CPU), "
        "DeepSpeed 0.19.8; fp32, the example GPT. Command: `python "
        f"benchmarks/snapshot.py --pairs {args.pairs} --steps {args.steps}`."
    )
    return "\n".join([head, "", *table, ""])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="keep it as a result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
