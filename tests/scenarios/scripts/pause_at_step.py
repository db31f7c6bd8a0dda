"""The DeepSpeed example, but before one step every rank waits for the test."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "deepspeed_gpt"))

import train  # noqa: E402

STEP = 8
DEADLINE_S = 60
good_step = train.train_step


def late_step(engine, batches):
    if engine.global_steps == STEP:
        folder = Path(os.environ["PAUSE_DIR"])
        (folder / f"paused.{os.getpid()}").touch()
        deadline = time.monotonic() + DEADLINE_S
        while not (folder / "go").exists():
            assert time.monotonic() < deadline, "the test never said go"
            time.sleep(0.01)
    return good_step(engine, batches)


train.train_step = late_step
sys.exit(train.main())
