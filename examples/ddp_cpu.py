"""The smallest example: plain torch DDP, protected by three lines.

    mnemosyne run --nproc-per-node 4 --standby 1 examples/ddp_cpu.py

Kill any worker while it runs (add `--chaos 'kill rank=1 step=50 phase=forward'`):
the others wait a moment, and the losses are those of a run without the kill.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mnemosyne_plugin  # 1

SEED = 7
NUM_FEATURES, NUM_CLASSES, BATCH = 64, 10, 32


def main() -> None:
    args = parse_args()
    dist.init_process_group()
    rank = dist.get_rank()
    torch.manual_seed(SEED)
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(SEED + 1 + rank)  # each rank drops out other neurons
    session = mnemosyne_plugin.attach(model=model, optimizer=optimizer)  # 2

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    for step in range(session.step, args.steps):
        loss = session.run(train_step, *batch(step, rank)).item()  # 3
        if args.loss_log is not None:
            append(args.loss_log, f"{step} {rank} {loss.hex()}")
        if rank == 0 and step % 20 == 0:
            print(f"step {step:4d}  loss {loss:.4f}", flush=True)


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, NUM_CLASSES),
    )


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return made-up points; the class of one is its largest of ten features."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    x = torch.randn(BATCH, NUM_FEATURES, generator=generator)
    return x, x[:, :NUM_CLASSES].argmax(dim=1)


def append(path: Path, line: str) -> None:
    """Add a line to a file that all ranks share; one write is one whole line."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loss-log", type=Path, help="file for: step, rank, loss")
    return parser.parse_args()


if __name__ == "__main__":
    main()
