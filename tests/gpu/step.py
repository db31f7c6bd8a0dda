"""What a training step of a GPT takes, and copies from and to host memory.

    python tests/gpu/step.py [--steps 50]

The GPT has 124 million parameters, in bf16; on the emulated device it is a small one.
Without the proxy the times are those of the same program on the same GPU.
"""

import argparse
import os
import time

import gpt
import torch
from torch import Tensor

from mnemosyne_plugin import proxy
from proxy_step import clock_of

IS_EMULATED = os.environ.get("MNEMOSYNE_PROXY_DEVICE") == "emulated"
NUM_WARM = 5
BATCH = 2 if IS_EMULATED else 8
if not IS_EMULATED:  # those of GPT-2
    gpt.VOCABULARY, gpt.LENGTH, gpt.WIDTH, gpt.HEADS = 50_304, 1024, 768, 12


class Clocks:
    """Wall time, and CPU time of this process and of the proxy's server."""

    def __init__(self, device: proxy.DeviceProxy | None) -> None:
        self.device = device
        self.server = clock_of(device.server_pid) if device is not None else None

    def now(self) -> tuple[float, ...]:
        """Return seconds, and the commands and round trips of the proxy so far."""
        theirs = time.clock_gettime(self.server) if self.server is not None else 0.0
        counts = self.device.counts() if self.device is not None else {}
        sent = (counts.get("commands", 0), counts.get("calls", 0))
        return time.monotonic(), time.process_time(), theirs, *sent


def train(num_steps: int) -> None:
    """Print milliseconds and commands per step."""
    torch.manual_seed(1)
    model = gpt.GPT(2 if IS_EMULATED else 12, 0.0)
    model.head.weight = model.tokens.weight  # as GPT-2 has it
    torch.nn.init.normal_(model.tokens.weight, std=0.02)
    model = model.bfloat16().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, gpt.VOCABULARY, (BATCH, gpt.LENGTH + 1)).pin_memory()

    def step() -> float:
        there = tokens.cuda(non_blocking=True)
        inputs, targets = there[:, :-1].contiguous(), there[:, 1:].contiguous()
        loss: Tensor = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(NUM_WARM):
        step()
    clocks = Clocks(proxy.loaded())
    walls = []
    before = last = clocks.now()
    for _ in range(num_steps):
        loss = step()
        now = clocks.now()
        walls.append((now[0] - last[0]) * 1e3)
        last = now
    wall, ours, theirs, commands, calls = (
        (b - a) / num_steps for a, b in zip(before, last, strict=True)
    )
    size = sum(p.numel() for p in model.parameters())
    print("parameters", size)
    print("loss", loss.hex(), f"{loss:.4f}")
    print("median_ms", f"{sorted(walls)[num_steps // 2]:.3f}")
    print("wall_ms", f"{wall * 1e3:.3f}")
    print("cpu_ms", f"{ours * 1e3:.3f}")
    print("server_cpu_ms", f"{theirs * 1e3:.3f}")
    print("commands", f"{commands:.1f}")
    print("round_trips", f"{calls:.1f}")


def copies() -> None:
    """Print GB/s between host memory and the device."""
    size = (16 << 20) if IS_EMULATED else (1 << 30)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    began = time.monotonic()
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    print("pin_ms", f"{(time.monotonic() - began) * 1e3:.1f}")
    pageable = torch.ones(size, dtype=torch.uint8)
    pinned.fill_(1)
    for name, to, source in (
        ("pinned_to_device", there, pinned),
        ("device_to_pinned", pinned, there),
        ("pageable_to_device", there, pageable),
        ("device_to_pageable", pageable, there),
    ):
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            began = time.monotonic()
            to.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.monotonic() - began)
        print(name, f"{size / min(times) / 1e9:.2f}")


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    train(options.steps)
    copies()


if __name__ == "__main__":
    main()
