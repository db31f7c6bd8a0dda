"""DDP whose model is compiled, with a functional collective in the compiled region.

mnemosyne run --nproc-per-node 4 compiled.py --backend aot_eager --steps 12
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mnemosyne_plugin


class Model(nn.Module):
    """Has the mean of its activations taken over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        mean = functional.all_reduce(hidden.mean(0).detach(), "avg", dist.group.WORLD)
        return self.second(hidden - mean)


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--loss-log", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group()
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = DistributedDataParallel(Model())
    compiled = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = mnemosyne_plugin.attach(model=model, optimizer=optimizer)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        return loss

    file = os.open(args.loss_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for step in range(session.step, args.steps):
        generator = torch.Generator().manual_seed(step * 1000 + rank)
        x = torch.randn(8, 16, generator=generator)
        loss = session.run(train_step, x, x[:, :4].argmax(1)).item()
        os.write(file, f"{step} {rank} {loss.hex()}\n".encode())
    unwaited = torch._C._distributed_c10d._get_work_registry_size()
    print(f"rank {rank} has not waited for {unwaited} works", flush=True)


if __name__ == "__main__":
    main()
