"""Prints how much memory operations hold once they have been waited for."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

NUM_OPERATIONS = 20
NUMEL = 1 << 20


def reduce() -> None:
    dist.all_reduce(torch.ones(NUMEL, device="cuda"))


def reduce_later() -> None:
    dist.all_reduce(torch.ones(NUMEL, device="cuda"), async_op=True).wait()


def gather() -> None:
    part = torch.ones(NUMEL // 2, device="cuda")
    dist.all_gather_into_tensor(torch.empty(NUMEL, device="cuda"), part)


def exchange() -> None:
    other = 1 - dist.get_rank()
    halves = torch.ones(NUMEL, device="cuda").chunk(2)
    sends = dist.P2POp(dist.isend, halves[0], other)
    receives = dist.P2POp(dist.irecv, halves[1], other)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()


def held(operation: Callable[[], None]) -> float:
    """Return the most memory that was in use, in its tensors."""
    operation()  # connects
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(NUM_OPERATIONS):
        operation()
    return (torch.cuda.max_memory_allocated() - before) / (4 * NUMEL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    lines = [
        f"{operation.__name__} {held(operation)}"
        for operation in (reduce, reduce_later, gather, exchange)
    ]
    if os.environ["RANK"] == "0":
        args.log.write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
