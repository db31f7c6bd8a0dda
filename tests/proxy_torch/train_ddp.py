"""The GPT of gpt.py under `mnemosyne run --device-proxy`, with DDP over NCCL.

    mnemosyne run --device-proxy --nproc-per-node 2 train_ddp.py --victim 1

Each server of the victim dies, or hangs, at a random one of its first operations; or,
with --devices, each of its workers has a device as MNEMOSYNE_EMULATED says; or, with
--break-in, those of its workers that come to that step lose theirs. The log gets a line
for each step and rank, and a hash of all that training has changed.
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta

import gpt
import torch
import torch.distributed as dist
from killing import Killing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mnemosyne_plugin
from mnemosyne_plugin import proxy


def next_of(devices: Sequence[str], log: str) -> str:
    """Return the device of this worker: each has its own, the last one for the rest."""
    with open(f"{log}.workers", "ab+") as workers:
        workers.write(b"+")
        return devices[min(workers.tell(), len(devices)) - 1]


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--timeout", type=float, default=600, help="of groups, s")
    parser.add_argument("--victim", type=int, default=-1, help="rank")
    parser.add_argument("--fault", default="kill")
    parser.add_argument("--kill-within", type=int, default=900)
    parser.add_argument("--devices", nargs="+", default=[], help="MNEMOSYNE_EMULATED")
    parser.add_argument("--break-in", type=int, default=-1, help="step")
    options = parser.parse_args()
    if options.devices and os.environ["RANK"] == str(options.victim):
        os.environ["MNEMOSYNE_EMULATED"] = next_of(options.devices, options.log)
        device = proxy.loaded()
        assert device is not None
        device.kill()
        device.recover(60)  # it reads the variable at its start
    torch.backends.cuda.enable_cudnn_sdp(False)  # has no host function
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    dist.init_process_group("nccl", timeout=timedelta(seconds=options.timeout))
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = DistributedDataParallel(gpt.GPT(2, 0.1).bfloat16().cuda(), device_ids=[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    # One more group, which not all ranks are in.
    pair = dist.new_group([0, 1])
    torch.manual_seed(2 + rank)
    session = mnemosyne_plugin.attach(model=model, optimizer=optimizer)

    side = torch.cuda.Stream()

    def train_step(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        total = torch.zeros((), device="cuda")
        for batch in batches:
            there = batch.cuda(non_blocking=True)
            tokens, targets = there[:, :-1].contiguous(), there[:, 1:].contiguous()
            loss = model(tokens, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        if rank == options.victim and session.step == options.break_in:
            device = proxy.loaded()
            assert device is not None
            device.kill()
        if rank in (0, 1):
            dist.all_reduce(total, group=pair)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # which the script itself does not wait for
            twice = total + total
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total, twice

    is_victim = rank == options.victim
    killing = None
    if is_victim and not options.devices and options.break_in < 0:
        killing = Killing(rank, options.kill_within, options.fault)
    file = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def log(line: str) -> None:
        os.write(file, f"{line}\n".encode())

    text = argparse.Namespace(
        steps=options.steps, accumulate=2, batch=4, seed=1, workers=2, pin=True
    )
    for step, batches in enumerate(gpt.batches(text)):
        if step < session.step:
            continue  # of a worker that was lost
        if killing is not None and step == options.steps - 1:
            killing.end()  # the script's own work behind its last step is not redone
        results = session.run(train_step, batches)
        # What the script itself asks a device between two steps is not done again.
        loss = float(results[0])
        assert is_victim or float(results[1]) == 2 * loss
        log(f"{step} {rank} {loss.hex()}")
    hashed = hashlib.sha256()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter, *(state[name] for name in sorted(state))):
            flat = tensor.detach().cpu().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().tobytes())
    log(f"digest {rank} {hashed.hexdigest()}")
    del batches, hashed
    torch.cuda.synchronize()
    log(f"memory {rank} {torch.cuda.memory_allocated()}")


if __name__ == "__main__":
    main()
