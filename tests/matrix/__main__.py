"""``python -m tests.matrix TRAINER``: kill everybody everywhere, print what held."""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matrix import (  # noqa: E402
    deepspeed_plan,
    deepspeed_ways,
    megatron_plan,
    megatron_ways,
)
from matrix.plan import VICTIMS  # noqa: E402
from matrix.runs import Runs  # noqa: E402
from matrix.table import Table  # noqa: E402

PLANS = {
    "deepspeed": deepspeed_plan,
    "deepspeed-ways": deepspeed_ways,
    "megatron": megatron_plan,
    "megatron-ways": megatron_ways,
}
FP16 = (
    "fp16: where the CPU has no instructions for it, DeepSpeed itself says `Type fp16 "
    "is not supported on your device`; the script tells it that torch can compute it"
)


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the job
    folder = args.folder or Path(tempfile.mkdtemp(prefix="matrix_"))
    plan: Any = PLANS[args.trainer]
    phases = args.phases or plan.PHASES
    rows = [(config, victim) for config in plan.CONFIGURATIONS for victim in VICTIMS]
    if args.diagonal:
        rows = list(plan.DIAGONAL)
    rows = [(c, v) for c, v in rows if args.only in c.name and v in args.victims]
    begun = time.monotonic()
    table, runs, lines = Table(phases), Runs(folder), []

    def show(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if args.output is not None:
            args.output.write_text("\n".join(lines) + "\n")

    show(table.head())
    for config, victim in rows:
        results = runs.row(config, victim, phases)
        show(table.row(f"{config.name} {victim}", results))
    is_megatron = args.trainer.startswith("megatron")
    if not is_megatron and any(config.dtype == "fp16" for config, _ in rows):
        show(FP16)
    show(f"{table.foot()}; {(time.monotonic() - begun) / 60:.1f} min")
    if table.counts["FAILED"]:
        print(f"the jobs that failed are kept in {folder}")
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("trainer", choices=list(PLANS))
    parser.add_argument("--diagonal", action="store_true", help="a quick part of it")
    parser.add_argument("--only", default="", help="part of a configuration's name")
    parser.add_argument("--victims", nargs="+", choices=list(VICTIMS), default=VICTIMS)
    parser.add_argument("--phases", nargs="+", help="only these")
    parser.add_argument("--output", type=Path, help="write the table here as well")
    parser.add_argument("--folder", type=Path, help="where jobs that failed stay")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
