"""The DeepSpeed example with a user's bug: rank 1 raises whenever it is at a step."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "deepspeed_gpt"))

import train  # noqa: E402

BAD_STEP = 6
good_step = train.train_step


def bad_step(engine, batches):
    if os.environ["RANK"] == "1" and engine.global_steps == BAD_STEP:
        raise ValueError(f"a bug of the user at step {BAD_STEP}")
    return good_step(engine, batches)


train.train_step = bad_step
sys.exit(train.main())
