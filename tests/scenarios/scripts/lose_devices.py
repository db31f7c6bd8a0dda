"""The DDP example; ranks lose their devices at given points of given steps.

The device is emulated, and torch has no CUDA here: each rank owns a few bytes of it, so
that there is a server. What a loss takes is played by NaN in parameters and moments.
A scheduler steps behind each step, in the script's own loop.
"""

import argparse
import ctypes
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import ddp_cpu  # noqa: E402

import mnemosyne_plugin  # noqa: E402
from mnemosyne_plugin import proxy, recovery  # noqa: E402


class Losing:
    """Loses the device once at each point that this rank was told."""

    def __init__(self, points: set[tuple[int, str]]) -> None:
        self._points = points
        self._calls = -1
        self.step = 0

    def is_due(self, name: str) -> bool:
        return (self.step, name) in self._points

    def at(self, name: str) -> None:
        if not self.is_due(name):
            return
        if name != "always":
            self._points.remove((self.step, name))
        device = proxy.loaded()
        assert device is not None
        device.kill()
        # The state is what the next call of CUDA tells, so make one.
        assert ctypes.CDLL(None).cudaDeviceSynchronize() != 0
        while not device.is_lost:
            os.sched_yield()
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.fill_(torch.nan)
                    for value in self.optimizer.state.get(parameter, {}).values():
                        value.fill_(torch.nan)

    def vote(self) -> None:
        """Vote; if the device is lost in it, hear of the loss before the outcome."""
        plain_vote()
        if self.is_due("vote"):
            self.at("vote")
            manager = recovery.current()
            assert manager.is_doomed
            raise manager.mesh.failure()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self.at("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.at("mutated"))


class Hooked(torch.nn.Module):
    """Returns its input, and reaches two points with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        losing.at("forward")
        if losing.is_due("together"):
            torch.distributed.barrier()  # nobody looks for failures from here on
            losing.at("together")
        losing.at("always")
        y = x.clone()
        if y.requires_grad:
            y.register_hook(lambda _: losing.at("backward"))
        return y


def attach(**options: object) -> object:
    global plain_vote
    optimizer = options["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    session = plain_attach(**options, scheduler=scheduler)
    losing.watch(optimizer)
    manager = recovery.current()
    plain_vote, manager._vote = manager._vote, losing.vote
    run = session.run

    def counting_run(*args: object) -> object:
        losing.step = session.step
        losing.at("between")
        loss = run(*args)
        scheduler.step()
        return loss

    session.run = counting_run
    return session


parser = argparse.ArgumentParser()
parser.add_argument("--lose", nargs="*", default=[], help="RANK:STEP:POINT")
ours, sys.argv[1:] = parser.parse_known_args()
wanted = [text.split(":") for text in ours.lose]
losing = Losing({(int(s), p) for r, s, p in wanted if r == os.environ["RANK"]})
plain_attach, mnemosyne_plugin.attach = mnemosyne_plugin.attach, attach
build_model = ddp_cpu.build_model
ddp_cpu.build_model = lambda: build_model().append(Hooked())
address = ctypes.c_void_p()
cuda = ctypes.CDLL(None)
if hasattr(cuda, "cudaMalloc"):
    assert cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(1024)) == 0
ddp_cpu.main()
