"""The DeepSpeed example, with the draws of a step seeded, so that a resume has them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "deepspeed_gpt"))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.ops  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

deepspeed.ops.__compatible_ops__ = {}  # or the plain job would compile one
good_step = train.train_step


def seeded_step(engine, batches):
    torch.manual_seed(engine.global_steps * 100 + engine.global_rank)
    return good_step(engine, batches)


train.train_step = seeded_step
sys.exit(train.main())
