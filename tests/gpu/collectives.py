"""NCCL in the proxy's server: made, aborted, and made anew, in the next server too.

    RANK=0 WORLD_SIZE=1 MASTER_ADDR=... MASTER_PORT=... python tests/gpu/collectives.py

Also what else a server does by itself: the times between events, and attention without
cuDNN, which the proxy has not.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from servers import end_server

from mnemosyne_plugin import proxy

COUNT = 10_000


def timed(name: str, function: Callable[[], object]) -> None:
    """Do something, and print what it took."""
    began = time.monotonic()
    function()
    print(name, f"{(time.monotonic() - began) * 1e3:.1f}")


def reduce_and_check() -> None:
    """Sum up over all ranks."""
    x = torch.full((COUNT,), float(dist.get_rank() + 1), device="cuda")
    dist.all_reduce(x)
    size = dist.get_world_size()
    assert x.tolist() == [size * (size + 1) / 2] * COUNT


def begin(store: dist.Store, epoch: int) -> None:
    """Have a group of all ranks, in place of the one before."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "nccl",
        store=dist.PrefixStore(f"group/{epoch}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=60),
    )


def abort() -> None:
    """End what the group's communicator does."""
    dist.group.WORLD._get_backend(torch.device("cuda")).abort()


def events() -> None:
    """Print what lies between two events, with work in between."""
    x = torch.randn(1024, 1024, device="cuda")
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.monotonic()
    first.record()
    for _ in range(2 if os.environ.get("MNEMOSYNE_PROXY_DEVICE") else 200):
        x = x @ x
    last.record()
    last.synchronize()
    wall_ms = (time.monotonic() - began) * 1e3
    between_ms = first.elapsed_time(last)
    print("event_ms wall_ms", f"{between_ms:.3f} {wall_ms:.3f}")
    assert 0 < between_ms <= wall_ms + 1


def attention(device: proxy.DeviceProxy) -> None:
    """Have torch choose among all ways that it has, as a script does by default."""
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # has no host function
    q, k, v = torch.randn(3, 2, 4, 64, 16, device="cuda", dtype=torch.bfloat16)
    try:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.cuda.synchronize()
        said = f"computed {tuple(mixed.shape)}"
    except RuntimeError as error:
        said = f"refused: {str(error).splitlines()[0]}"
    assert not device.is_lost
    print("attention_by_default", said)
    torch.backends.cuda.enable_cudnn_sdp(False)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert mixed.isfinite().all()
    print("attention_without_cudnn finite")


def main() -> None:
    """Print what each took."""
    device = proxy.loaded()
    assert device is not None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=os.environ["RANK"] == "0",
        timeout=timedelta(seconds=60),
    )
    begin(store, 0)
    print("nccl", *torch.cuda.nccl.version())
    timed("first_all_reduce_ms", reduce_and_check)
    timed("all_reduce_ms", reduce_and_check)
    timed("abort_ms", abort)
    timed("renew_ms", lambda: begin(store, 1))
    timed("all_reduce_behind_abort_ms", reduce_and_check)
    end_server(device)
    timed("recover_ms", lambda: device.recover(60))
    timed("renew_in_next_server_ms", lambda: begin(store, 2))
    timed("all_reduce_in_next_server_ms", reduce_and_check)
    events()
    attention(device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
