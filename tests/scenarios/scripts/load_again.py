"""A script that goes back to a checkpoint behind its eighth step, once.

Micro-steps count on through a load, so a worker that is started anew decides the same.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.append(str(Path(__file__).parents[2] / "matrix"))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from facts import append, digest  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from model import Net, Sentences, groups  # noqa: E402
from train import seed_all, state  # noqa: E402

STEPS, SAVE_BEHIND, LOAD_BEHIND = 8, 4, 6


def main() -> None:
    args = parse_args()
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
    seed_all(1)
    model = Net()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config=str(args.deepspeed_config),
    )
    data = Sentences()
    per_step = engine.gradient_accumulation_steps()
    while engine.global_steps < STEPS:
        number = engine.micro_steps // per_step
        batch = default_collate([data[10 * rank + number]])
        for _ in range(per_step):
            loss = engine(*batch)
            engine.backward(loss)
            engine.step()
        line = f"{loss.item().hex()},{engine.global_steps}"
        append(args.loss_log, f"{number} {rank} {line}")
        if number + 1 == SAVE_BEHIND:
            engine.save_checkpoint(args.checkpoint_dir)
        if number + 1 == LOAD_BEHIND:
            engine.load_checkpoint(args.checkpoint_dir, f"global_step{SAVE_BEHIND}")
    append(args.final_state, f"{rank} {digest(state(engine))}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--loss-log", type=Path, required=True)
    parser.add_argument("--final-state", type=Path, required=True)
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
