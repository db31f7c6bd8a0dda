"""The DDP example; rank 1 aborts the default group in the midst of a step, once."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import ddp_cpu  # noqa: E402

STEP = 12
build_model = ddp_cpu.build_model


class AbortsOnce(torch.nn.Module):
    """Returns its input; the n-th time that it is called it aborts the group first."""

    num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        if self.num_calls == STEP + 1 and os.environ["RANK"] == "1":
            dist.group.WORLD.abort()
        return x


ddp_cpu.build_model = lambda: build_model().append(AbortsOnce())
ddp_cpu.main()
