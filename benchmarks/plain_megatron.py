"""The example of Megatron without us: what its users do, checkpoints and restarts.

Each rank writes its own part in a file; one that all ranks have written counts.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/megatron_gpt"))

import torch.distributed as dist  # noqa: E402
from train_core import (  # noqa: E402
    arguments,
    log,
    make_train_step,
    micro_batches,
    set_up,
    torch,
)


def main() -> None:
    parser = arguments()
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    args = parser.parse_args()
    model, optimizer, scheduler, dataset = set_up(args)
    newest = args.checkpoint_dir / "newest"
    begin = int(newest.read_text()) if newest.exists() else 0
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    if begin:
        load(args.checkpoint_dir / str(begin), model, inner, scheduler)
    batches = micro_batches(dataset, begin)
    train_step = make_train_step(model, optimizer, scheduler)
    for step in range(begin, args.steps):
        log(args, step, train_step(batches))
        if (step + 1) % args.save_every == 0:
            folder = args.checkpoint_dir / str(step + 1)
            folder.mkdir(parents=True, exist_ok=True)
            save(folder, model, inner, scheduler)
            dist.barrier()
            if dist.get_rank() == 0:
                (folder / "newest").write_text(str(step + 1))
                os.replace(folder / "newest", newest)


def save(folder: Path, model: Any, inner: list[Any], scheduler: Any) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": [each.state_dict() for each in inner],
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, folder / f"{dist.get_rank()}.pt")


def load(folder: Path, model: Any, inner: list[Any], scheduler: Any) -> None:
    state = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=False)
    model.load_state_dict(state["model"])
    for each, values in zip(inner, state["optimizer"], strict=True):
        each.load_state_dict(values)
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])


if __name__ == "__main__":
    main()
