"""The DeepSpeed example; ranks lose their devices in given phases of given steps.

The device is emulated, and torch has no CUDA here: each rank owns a few bytes of it, so
that there is a server. What a loss takes is played by NaN in all that is trained.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "deepspeed_gpt"))

import train  # noqa: E402
from mnemosyne_plugin import proxy, recovery  # noqa: E402


def state() -> Iterator[torch.Tensor]:
    """Yield parameters, gradients, fp32 copies and moments."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    yield from engine.module.parameters()
    for group in optimizer.param_groups:
        yield from group["params"]
    for parameter, values in optimizer.state.items():
        yield parameter
        yield from (value for value in values.values() if torch.is_tensor(value))


def lose_device() -> None:
    device = proxy.loaded()
    device.kill()
    # The state is what the next call of CUDA tells, so make one.
    assert ctypes.CDLL(None).cudaDeviceSynchronize() != 0
    while not device.is_lost:
        os.sched_yield()
    with torch.no_grad():
        for tensor in state():
            for lost in (tensor, tensor.grad):
                if lost is not None and lost.is_floating_point():
                    lost.fill_(torch.nan)


def on_phase(rank: int, phase: str, step: int) -> None:
    if (step, phase) in points:
        points.remove((step, phase))
        lose_device()


def initialize(**options: object) -> tuple:
    global engine
    made = plain_initialize(**options)
    engine, manager = made[0], recovery.current()
    manager._on_phase = on_phase
    cuda, address = ctypes.CDLL(None), ctypes.c_void_p()
    if hasattr(cuda, "cudaMalloc"):
        assert cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(1024)) == 0
    return made


wanted = [text.split(":") for text in os.environ["LOSE"].split()]  # RANK:STEP:PHASE
points = {(int(s), p) for r, s, p in wanted if r == os.environ["RANK"]}
plain_initialize = train.deepspeed.initialize
train.deepspeed.initialize = initialize
sys.exit(train.main())
