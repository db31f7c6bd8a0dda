"""What a call through the device proxy costs, against one that waits for its answer.

Calls that nobody waits for (launches, copies, memsets) go into a ring; the prototype of
the paper waits for a reply to each. Both are timed on the emulated device, in pairs.
With `--torch PYTHON`, a python with torch's CUDA build, it also counts what a training
step of tests/proxy_torch sends.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from mnemosyne_plugin.proxy import preload

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "benchmarks" / "proxy_call.c"
PROGRAM = ROOT / "build" / "proxy_call"
RESULT = ROOT / "benchmarks" / "results" / "proxy_call_2cores_2026-11-26.md"
KERNELS = ROOT / "build" / "proxy_torch" / "libtorch_host_kernels.so"


def main() -> None:
    args = parse_args()
    PROGRAM.parent.mkdir(exist_ok=True)
    subprocess.run(["cc", "-O2", "-o", PROGRAM, SOURCE, "-ldl"], check=True)
    runs = [measure(args.calls) for _ in range(args.runs)]
    _, wall, answered = (
        statistics.median(column) for column in zip(*runs, strict=True)
    )
    lines = [
        "| | median | of each run |",
        "|---|---|---|",
        row("a call that nobody waits for, ns of the client's CPU", runs, 0),
        row("the same, ns of wall time", runs, 1),
        row("a call and its answer, us of wall time", runs, 2),
        "",
        f"Waiting for each answer takes {answered * 1e3 / wall:.0f} times as long.",
    ]
    if args.torch:
        lines += ["", *steps(args.torch)]
    print("\n".join(lines))
    if args.write:
        head = (
            "# A call through the device proxy, 2026-11-26\n\nTwo cores, no GPU: the "
            "emulated device. Command: `python benchmarks/proxy_call.py"
            f"{' --torch PYTHON' if args.torch else ''}`.\n"
        )
        RESULT.write_text("\n".join([head, *lines, ""]))


def measure(calls: int) -> list[float]:
    """Return ns of CPU, ns of wall time, and us with an answer."""
    done = subprocess.run(
        [PROGRAM, str(calls)],
        env=on_emulated_device(),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"proxy_call.py: error: {done.stderr.strip()}")
    return [float(word) for word in done.stdout.split()]


def row(name: str, runs: list[list[float]], column: int) -> str:
    values = [run[column] for run in runs]
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"| {name} | {statistics.median(values):.1f} | {each} |"


def steps(python: str) -> list[str]:
    """Count what a step of GPTs of two sizes sends."""
    lines = [
        "| GPT, bf16, 2 micro-batches a step | commands | of them wait | kB |",
        "|---|---|---|---|",
    ]
    for layers in (2, 12):
        few, many = (count(python, layers, number) for number in (4, 8))
        commands, waits, size = ((b - a) / 4 for a, b in zip(few, many, strict=True))
        lines.append(
            f"| {layers} layers | {commands:.0f} | {waits:.1f} | {size / 1e3:.0f} |"
        )
    return lines


def count(python: str, layers: int, number: int) -> list[int]:
    """Return commands, round trips and bytes of a run of so many steps."""
    program = ROOT / "tests" / "proxy_torch" / "gpt.py"
    done = subprocess.run(
        [python, program, f"--layers={layers}", f"--steps={number}", "--counts"],
        env=on_emulated_device() | {"MNEMOSYNE_EMULATED_KERNELS": str(KERNELS)},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("counts"))
    return [int(word) for word in line.split()[1:]]


def on_emulated_device() -> dict[str, str]:
    environment = os.environ | {"MNEMOSYNE_PROXY_DEVICE": "emulated"}
    return environment | preload(environment)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--torch", metavar="PYTHON", help="has torch's CUDA build")
    parser.add_argument("--write", action="store_true", help="keep it as a result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
