"""What a call through the device proxy costs, and what it adds to a training step.

Calls that nobody waits for (launches, copies, memsets) go into a ring; the prototype of
the paper waits for a reply to each. Both are timed on the emulated device, in pairs.
With `--torch PYTHON`, a python with torch's CUDA build, it also counts what a training
step of tests/proxy_torch sends, and compares the CPU time of a step, client and server
together, with that of the same step without ring and server: in_process.cc.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mnemosyne_plugin.proxy import preload

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
SOURCE = HERE / "proxy_call.c"
PROGRAM = ROOT / "build" / "proxy_call"
IN_PROCESS = ROOT / "build" / "benchmarks"
KERNELS = ROOT / "build" / "proxy_torch" / "libtorch_host_kernels.so"
NUM_WARM = 3  # steps that make what later ones find


def main() -> None:
    args = parse_args()
    PROGRAM.parent.mkdir(exist_ok=True)
    subprocess.run(["cc", "-O2", "-o", PROGRAM, SOURCE, "-ldl"], check=True)
    inline = build_in_process()
    lines = calls(args.calls, args.runs, inline)
    if args.torch:
        lines += ["", *steps(args.torch, args.steps, args.runs, inline)]
    else:
        lines += [
            "",
            "Left out: what a training step sends, and the CPU time that the proxy "
            "adds to it. They need torch's CUDA build: `--torch PYTHON`.",
        ]
    print("\n".join(lines))
    if args.write:
        today = date.today().isoformat()
        head = (
            f"# A call through the device proxy, {today}\n\nTwo cores, no GPU: the "
            "emulated device. Command: `python benchmarks/proxy_call.py"
            f"{' --torch PYTHON' if args.torch else ''}`.\n"
        )
        result = HERE / "results" / f"proxy_call_2cores_{today}.md"
        result.write_text("\n".join([head, *lines, ""]))


def build_in_process() -> dict[str, str]:
    """Build the client that calls the device itself; return its environment."""
    cmake, ninja = tool("cmake"), f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    for command in (
        [cmake, "-S", HERE, "-B", IN_PROCESS, "-G", "Ninja", ninja],
        [cmake, "--build", IN_PROCESS],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    proxied = on_emulated_device()
    names = [Path(path) for path in proxied["LD_PRELOAD"].split(":")[:2]]
    # The rest of an installation lies beside it, where the real client finds it too.
    for path in (names[1], names[0].with_name("libmnemosyne_emulated.so")):
        shutil.copy2(path, IN_PROCESS / path.name)
    paths = [str(IN_PROCESS / path.name) for path in names]
    return proxied | {"LD_PRELOAD": ":".join(paths)}


def tool(name: str) -> str:
    """Return the path of a build tool, which a wheel may have put beside python."""
    beside_python = os.path.dirname(sys.executable)
    path = os.pathsep.join([os.environ.get("PATH", ""), beside_python])
    return shutil.which(name, path=path) or sys.exit(f"proxy_call.py needs {name}")


def calls(number: int, runs: int, inline: Mapping[str, str]) -> list[str]:
    """Time single calls."""
    proxied = on_emulated_device()
    times, times_inline = [], []
    for _ in range(runs):
        times.append(measure(number, proxied, has_server=True))
        times_inline.append(measure(number, inline, has_server=False))
    _, wall, answered, _ = map(statistics.median, zip(*times, strict=True))
    return [
        "| | median | of each run |",
        "|---|---|---|",
        row("a call that nobody waits for, ns of the client's CPU", times, 0),
        row("the same, ns of wall time", times, 1),
        row("a call and its answer, us of wall time", times, 2),
        row("from a lost server to the next, ms of wall time", times, 3),
        row("in process: a call that nobody waits for, ns of CPU", times_inline, 0),
        row("in process: a call and its answer, us of wall time", times_inline, 2),
        "",
        f"Waiting for each answer takes {answered * 1e3 / wall:.0f} times as long.",
    ]


def measure(
    number: int, environment: Mapping[str, str], has_server: bool
) -> list[float]:
    """Return ns of CPU, ns of wall time, us with an answer, and ms of a recovery."""
    done = subprocess.run(
        [PROGRAM, str(number), str(int(has_server))],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"proxy_call.py: error: {done.stderr.strip()}")
    return [float(word) for word in done.stdout.split()]


def row(name: str, runs: Sequence[Sequence[float]], column: int) -> str:
    values = [run[column] for run in runs]
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"| {name} | {statistics.median(values):.1f} | {each} |"


@dataclass(frozen=True)
class Step:
    """What a step took of both processes' CPU time."""

    ours_ms: float
    server_ms: float
    commands: float

    @property
    def total_ms(self) -> float:
        """The sum."""
        return self.ours_ms + self.server_ms


def steps(python: str, number: int, runs: int, inline: Mapping[str, str]) -> list[str]:
    """Count what a step of GPTs of two sizes sends, and what CPU time it takes."""
    sent = [
        "| GPT, bf16, 2 micro-batches a step | commands | of them wait | kB |",
        "|---|---|---|---|",
    ]
    spent = [
        "| CPU ms per step | proxy: training process | its server | in process "
        "| added (of each pair of runs) | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for layers in (2, 12):
        few, many = (count(python, layers, steps) for steps in (4, 8))
        commands, waits, size = ((b - a) / 4 for a, b in zip(few, many, strict=True))
        sent.append(
            f"| {layers} layers | {commands:.0f} | {waits:.1f} | {size / 1e3:.0f} |"
        )
        pairs = [
            tuple(
                train(python, layers, number, environment)
                for environment in (on_emulated_device(), inline)
            )
            for _ in range(runs)
        ]
        assert all(a.commands == b.commands for a, b in pairs)
        proxied, within = (
            min(side, key=lambda step: step.total_ms)
            for side in zip(*pairs, strict=True)
        )
        each = ", ".join(f"{a.total_ms - b.total_ms:.2f}" for a, b in pairs)
        spent.append(
            f"| {layers} layers | {proxied.ours_ms:.2f} | {proxied.server_ms:.2f} "
            f"| {within.total_ms:.2f} | {proxied.total_ms - within.total_ms:.2f} "
            f"({each}) | {proxied.total_ms / within.total_ms:.3f} |"
        )
    return [
        *sent,
        "",
        *spent,
        "",
        f"The least of {number} steps in each of {runs} runs: what else a machine does "
        "only adds. In process: the same client and the server's code in the training "
        "process, called at once in place of the ring; the device and the host "
        "functions that play its kernels are the same, and are in all of these "
        "numbers. What turns a command into bytes and back is in both: at most what a "
        "whole call in process takes, above.",
    ]


def train(
    python: str, layers: int, number: int, environment: Mapping[str, str]
) -> Step:
    """Return the one that took least of the steps behind the first ones."""
    done = subprocess.run(
        [
            *(python, HERE / "proxy_step.py"),
            *(f"--layers={layers}", f"--steps={number + NUM_WARM}"),
        ],
        env={**environment, "MNEMOSYNE_EMULATED_KERNELS": str(KERNELS)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"proxy_call.py: error: {done.stderr.strip()}")
    lines = [map(float, line.split()) for line in done.stdout.splitlines()[NUM_WARM:]]
    return min((Step(*line) for line in lines), key=lambda step: step.total_ms)


def count(python: str, layers: int, number: int) -> list[int]:
    """Return commands, round trips and bytes of a run of so many steps."""
    program = ROOT / "tests" / "proxy_torch" / "gpt.py"
    done = subprocess.run(
        [python, program, f"--layers={layers}", f"--steps={number}", "--counts"],
        env=on_emulated_device()
        | {"MNEMOSYNE_EMULATED_KERNELS": str(KERNELS), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("counts"))
    return [int(word) for word in line.split()[1:]]


def on_emulated_device() -> dict[str, str]:
    environment = os.environ | {
        "MNEMOSYNE_PROXY_DEVICE": "emulated",
        "OMP_NUM_THREADS": "1",
    }
    return environment | preload(environment)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--torch", metavar="PYTHON", help="has torch's CUDA build")
    parser.add_argument("--write", action="store_true", help="keep it as a result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
