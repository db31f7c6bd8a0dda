"""What it costs to replace one rank: links repaired, against gloo's groups made anew.

A rank is killed; when its successor is there, imported and waiting, the clock starts.
It stops when all ranks are through a barrier over all links (`linked`), and when all
have reduced once on every group (`reduced`). gloo's groups are torn down and made anew
by the survivors and the newcomer, in two ways: with torch.distributed, as users do, and
as bare ProcessGroupGloo objects. All three run one after the other in one run.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from replaceable import WAYS, Ranks, Repair

OURS = WAYS[0]
RESULTS = Path(__file__).parent / "results"
WANTED_MS, WANTED_RATIO = 20.0, 10.0

Case = tuple[int, int]  # ranks, groups


def main() -> None:
    args = parse_args()
    text = header()
    repairs: dict[Case, dict[str, list[Repair]]] = {}
    for size in args.ranks:
        for num_groups in args.groups:
            # 64 ranks with 16 gloo groups are 64 * 63 * 16 sockets: minutes.
            with_gloo = size * size * num_groups <= args.gloo_connections
            ways = WAYS if with_gloo else (OURS,)
            case = {way: measure(way, size, num_groups, args.repeats) for way in ways}
            repairs[size, num_groups] = case
            print(f"{size} ranks, {num_groups} groups: done", flush=True)
    text += "\n".join(table(repairs) + verdict(repairs)) + "\n"
    print(text)
    if args.write:
        date = time.strftime("%Y-%m-%d")
        path = RESULTS / f"reconfigure_{os.cpu_count()}cores_{date}.md"
        path.write_text(text)
        print(f"written to {path}")


def measure(way: str, size: int, num_groups: int, repeats: int) -> list[Repair]:
    """Replace one rank after the other."""
    with Ranks(way, size, num_groups) as ranks:
        return [ranks.replace((3 * n + 1) % size) for n in range(repeats)]


def header() -> str:
    return (
        f"# Reconfigure, {time.strftime('%Y-%m-%d')}\n\n"
        f"{os.cpu_count()} cores, no GPU; torch {torch.__version__}, "
        f"Python {platform.python_version()}; load average "
        f"{os.getloadavg()[0]:.1f}. Command: `python benchmarks/reconfigure.py`.\n"
        "Every rank is a process with torch and real process groups; the newcomer is\n"
        "started and imported before the clock starts. Milliseconds, min / median.\n"
        "`links`: replaced (kept). `bytes`: sent by all ranks until the barrier is\n"
        "over. Ratios are of medians, until all groups have reduced.\n\n"
    )


def table(repairs: dict[Case, dict[str, list[Repair]]]) -> list[str]:
    lines = [
        "| ranks | groups | links | bytes | linked | reduced | "
        "gloo, torch.distributed | ratio | gloo, bare groups | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (size, num_groups), ways in repairs.items():
        ours = ways[OURS]
        row = [
            f"{size}",
            f"{num_groups}",
            f"{ours[-1].links_replaced} ({ours[-1].links_kept})",
            f"{statistics.median(one.bytes_sent for one in ours):.0f}",
            spread([one.linked_ms for one in ours]),
            spread([one.reduced_ms for one in ours]),
        ]
        for way in WAYS[1:]:
            if way in ways:
                row += [
                    spread([one.reduced_ms for one in ways[way]]),
                    f"{ratio(ours, ways[way]):.1f}",
                ]
            else:
                row += ["not measured", ""]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def verdict(repairs: dict[Case, dict[str, list[Repair]]]) -> list[str]:
    """Say whether what is wanted was reached."""
    eight = {g: ways[OURS] for (size, g), ways in repairs.items() if size == 8}
    lines = [""]
    for num_groups, ours in eight.items():
        linked = statistics.median(one.linked_ms for one in ours)
        lines.append(
            f"8 ranks, {num_groups} groups: links back in {linked:.1f} ms "
            f"(wanted: under {WANTED_MS:.0f})."
        )
    ratios = {
        case: min(ratio(ways[OURS], ways[way]) for way in WAYS[1:])
        for case, ways in repairs.items()
        if len(ways) == len(WAYS)
    }
    if ratios:
        size, num_groups = min(ratios, key=lambda case: ratios[case])
        lines.append(
            f"The smallest ratio to gloo's re-creation is "
            f"{ratios[size, num_groups]:.1f}, at {size} ranks with {num_groups} "
            f"groups (wanted: {WANTED_RATIO:.0f})."
        )
    return lines


def ratio(ours: Sequence[Repair], theirs: Sequence[Repair]) -> float:
    return statistics.median(one.reduced_ms for one in theirs) / statistics.median(
        one.reduced_ms for one in ours
    )


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} / {statistics.median(values):.1f}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--gloo-connections",
        type=int,
        default=20_000,
        help="leave gloo out where ranks * ranks * groups is more",
    )
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
