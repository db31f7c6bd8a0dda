"""The DeepSpeed example with a user's bug: rank 1 reduces alone at a step."""

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "deepspeed_gpt"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import train  # noqa: E402

BAD_STEP = 6
good_step = train.train_step


def bad_step(engine, batches):
    if engine.global_steps == 0:
        group = dist.new_group(timeout=timedelta(seconds=1))

        def in_forward(*args):
            if dist.get_rank() == 1 and engine.global_steps == BAD_STEP:
                dist.all_reduce(torch.zeros(1), group=group)

        engine.module.register_forward_hook(in_forward)
    return good_step(engine, batches)


train.train_step = bad_step
sys.exit(train.main())
