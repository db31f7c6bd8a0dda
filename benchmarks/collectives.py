"""Collectives of CPU tensors: Mnemosyne against gloo, paired in one run.

The same processes hold a group of each backend and time both in turn, in blocks of
about 50 ms. A size is that of a rank's largest buffer: the input of all-reduce,
reduce-scatter, broadcast, all-to-all and send, the output of all-gather. A time is the
mean of a block on its slowest rank; the median over the blocks is shown. send is a
whole ping-pong between rank 0 and rank 1, there and back.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = tuple(4 << shift for shift in range(0, 26, 2))  # 4 B .. 64 MiB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRANSPORTS = ("shm", "tcp")
BLOCKS, BLOCK_S, MAX_REPEATS = 3, 0.05, 200
SETTINGS = {"OMP_NUM_THREADS": "1"}
DEADLINE_S = 600


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured pair; times in seconds."""

    ranks: int
    transport: str
    dtype: str
    name: str
    size_bytes: int
    ours_s: float
    gloo_s: float

    @property
    def ratio(self) -> float:
        return self.gloo_s / self.ours_s


Run = Callable[[], Any]


def operations(
    group: Any, rank: int, ranks: int, size: int, dtype: torch.dtype
) -> Iterator[tuple[str, Run]]:
    """Yield each collective as a function that does it once, on its own buffers."""
    numel = max(size // dtype.itemsize, 1)
    whole = torch.zeros(-(-numel // ranks) * ranks, dtype=dtype)
    other = torch.zeros_like(whole)
    part = torch.zeros(whole.numel() // ranks, dtype=dtype)
    yield "all_reduce", lambda: dist.all_reduce(whole[:numel], group=group)
    yield (
        "reduce_scatter",
        lambda: dist.reduce_scatter_tensor(part, whole, group=group),
    )
    yield (
        "all_gather",
        lambda: dist.all_gather_into_tensor(whole, part, group=group),
    )
    yield "broadcast", lambda: dist.broadcast(whole[:numel], 0, group=group)
    yield "all_to_all", lambda: dist.all_to_all_single(other, whole, group=group)

    def ping_pong() -> None:
        if rank == 0:
            dist.send(whole[:numel], 1, group=group)
            dist.recv(whole[:numel], 1, group=group)
        elif rank == 1:
            dist.recv(whole[:numel], 0, group=group)
            dist.send(whole[:numel], 0, group=group)

    yield "send", ping_pong
    if size == SIZES[0]:
        yield "barrier", lambda: dist.barrier(group=group)


def slowest(seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def block(run: Run, group: Any, repeats: int) -> float:
    """Return the seconds of one call, on the slowest rank."""
    dist.barrier(group=group)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return slowest(time.perf_counter() - begin) / repeats


def compare(runs: dict[str, Run], groups: dict[str, Any]) -> dict[str, float]:
    """Time both backends in turn; return the median of each."""
    repeats = {}
    for name, run in runs.items():
        once = block(run, groups[name], 2)  # warms up, too
        repeats[name] = max(2, min(MAX_REPEATS, int(BLOCK_S / once)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(BLOCKS):
        for name, run in runs.items():
            times[name].append(block(run, groups[name], repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def work(
    rank: int, ranks: int, transport: str, store: str, args: Any, results: Any
) -> None:
    """Be one rank. Rank 0 puts its points into ``results``, and None at the end."""
    from mnemosyne_plugin.ccl import Mesh, register

    torch.set_num_threads(1)
    # torch 2.13 renames what older ones have under these names only.
    warnings.simplefilter("ignore", FutureWarning)
    mesh = Mesh(
        worker_id=rank + 1,
        secret=b"benchmark",
        transport="auto" if transport == "shm" else "tcp",
    )
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=300),
    )
    members: list[Any] = [None] * ranks
    dist.all_gather_object(members, (rank + 1, mesh.address))
    mesh.reconfigure(0, rank, members)
    register(lambda: mesh)
    groups = {"ours": dist.new_group(backend="mnemosyne"), "gloo": dist.group.WORLD}
    for dtype in args.dtypes:
        for size in args.sizes:
            pairs = zip(
                operations(groups["ours"], rank, ranks, size, DTYPES[dtype]),
                operations(groups["gloo"], rank, ranks, size, DTYPES[dtype]),
                strict=True,
            )
            for (name, ours), (_, gloo) in pairs:
                if args.operations and name not in args.operations:
                    continue
                times = compare({"ours": ours, "gloo": gloo}, groups)
                if rank == 0:
                    point = Point(
                        ranks=ranks,
                        transport=transport,
                        dtype=dtype,
                        name=name,
                        size_bytes=size,
                        ours_s=times["ours"],
                        gloo_s=times["gloo"],
                    )
                    results.put(point)
    if rank == 0:
        results.put(None)
    dist.destroy_process_group()
    mesh.close()


def measure(ranks: int, transport: str, args: Any) -> list[Point]:
    """Run one set of processes and return what their rank 0 has measured."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as folder:
        store = str(Path(folder) / "store")
        context_args = (ranks, transport, store, args, results)
        processes = [
            context.Process(target=work, args=(rank, *context_args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        points = []
        while (point := results.get(timeout=DEADLINE_S)) is not None:
            points.append(point)
            print(row(point), flush=True)
        for process in processes:
            process.join(DEADLINE_S)
            if process.exitcode != 0:
                sys.exit(f"collectives.py: a rank ended with {process.exitcode}")
    return points


HEADER = """
| ranks | links | type | collective | bytes | ours, us | gloo, us | gloo / ours |
|---|---|---|---|---|---|---|---|"""


def row(point: Point) -> str:
    return (
        f"| {point.ranks} | {point.transport} | {point.dtype} | {point.name} "
        f"| {point.size_bytes} | {point.ours_s * 1e6:.1f} | {point.gloo_s * 1e6:.1f} "
        f"| {point.ratio:.2f} |"
    )


def copy_bandwidth() -> float:
    """Return bytes read and written per second by one core that copies 64 MiB."""
    source = torch.ones(SIZES[-1], dtype=torch.uint8)
    target = torch.zeros_like(source)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() / best


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def against_the_machine(point: Point, bandwidth: float) -> str:
    """Set a large all-reduce against the fewest bytes that it must move.

    Every rank must read the other ranks' shares of its own part, and write the parts of
    the others: at least 2 (n - 1) / n of the size read and as much written, per rank.
    """
    share = 2 * (point.ranks - 1) / point.ranks * point.size_bytes
    moved = 2 * share * point.ranks
    cores = min(os.cpu_count() or 1, point.ranks)
    best_s = moved / (bandwidth * cores)
    return (
        f"all_reduce of {point.size_bytes} bytes on {point.ranks} ranks over "
        f"{point.transport}: moves at least {moved / 1e9:.2f} GB; {cores} cores copy "
        f"{bandwidth * cores / 1e9:.1f} GB/s read and written, so at best it takes "
        f"{best_s * 1e3:.1f} ms; ours takes {point.ours_s * 1e3:.1f} ms and reaches "
        f"{best_s / point.ours_s:.0%} of that bandwidth, gloo "
        f"{best_s / point.gloo_s:.0%}"
    )


def summary(points: list[Point]) -> str:
    """Say how often and where gloo is faster, and the worst ratio of each kind."""
    lines = []
    kinds = sorted({(p.ranks, p.transport, p.name) for p in points})
    for ranks, transport, name in kinds:
        of_kind = [
            p
            for p in points
            if (p.ranks, p.transport, p.name) == (ranks, transport, name)
        ]
        worst = min(of_kind, key=lambda p: p.ratio)
        median = statistics.median(p.ratio for p in of_kind)
        slower = sum(p.ratio < 1 for p in of_kind)
        lines.append(
            f"| {ranks} | {transport} | {name} | {median:.1f} | {worst.ratio:.2f} at "
            f"{worst.size_bytes} B {worst.dtype} | {slower} of {len(of_kind)} |"
        )
    return "\n".join(lines)


SUMMARY_HEADER = """
| ranks | links | collective | median gloo / ours | worst | slower than gloo |
|---|---|---|---|---|---|"""


def plot(points: list[Point], path: Path) -> None:
    """Draw the ratio over the size, one panel per transport and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(p.transport, p.ranks) for p in points})
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4), sharey=True, squeeze=False
    )
    for axis, (transport, ranks) in zip(axes[0], panels, strict=True):
        own = [p for p in points if (p.transport, p.ranks) == (transport, ranks)]
        for name in sorted({p.name for p in own} - {"barrier"}):
            line = [p for p in own if p.name == name and p.dtype == "fp32"]
            axis.plot(
                [p.size_bytes for p in line],
                [p.ratio for p in line],
                marker=".",
                label=name,
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_title(f"{transport}, {ranks} ranks, fp32")
        axis.set_xlabel("bytes")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time of gloo / time of ours")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--operations", nargs="+", default=())
    parser.add_argument("--plot", type=Path, help="a PNG; needs matplotlib")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.update(SETTINGS)
    bandwidth = copy_bandwidth()
    print(HEADER)
    points = []
    for ranks in args.ranks:
        for transport in args.transports:
            points += measure(ranks, transport, args)
    print(SUMMARY_HEADER)
    print(summary(points), end="\n\n")
    for point in points:
        is_large = point.size_bytes == max(args.sizes) and point.dtype == "fp32"
        if point.name == "all_reduce" and is_large:
            print(against_the_machine(point, bandwidth))
    if args.plot is not None:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
