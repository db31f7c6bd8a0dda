"""Prints what CPU time each training step of a GPT takes: see proxy_call.py.

A line for each step: ms of this process, ms of the proxy's server (0 if there is none),
and the commands that were sent.
"""

import argparse
import ctypes
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "proxy_torch")]

import gpt  # noqa: E402

from mnemosyne_plugin import proxy  # noqa: E402


def clock_of(pid: int) -> int:
    """Return the clock of another process's CPU time."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        sys.exit(f"process {pid} has no clock")
    return clock.value


def main() -> None:
    """Train, and look at the clocks in front of and behind each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(
        namespace=argparse.Namespace(
            batch=4, accumulate=2, dropout=0.0, dtype="bf16", workers=0, pin=False
        )
    )
    options.ddp, options.device, options.seed = False, "cuda", 1
    torch.backends.cuda.enable_cudnn_sdp(False)  # has no host function
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    device = proxy.loaded()
    assert device is not None
    training = gpt.Training(options)
    training.begin()
    server = clock_of(device.server_pid) if device.server_pid else None

    def now() -> tuple[float, float, int]:
        theirs = time.clock_gettime(server) if server is not None else 0.0
        return time.process_time(), theirs, device.counts()["commands"]

    for batches in gpt.batches(options):
        before = now()
        training.step(batches)
        ours, theirs, commands = (b - a for a, b in zip(before, now(), strict=True))
        print(f"{ours * 1e3:.4f} {theirs * 1e3:.4f} {commands}")


if __name__ == "__main__":
    main()
