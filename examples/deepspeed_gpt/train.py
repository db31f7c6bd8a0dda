"""Train a byte-level GPT with DeepSpeed.

A plain DeepSpeed script: it knows nothing of Mnemosyne. The section "mnemosyne" of
the ds_config is all that protects it, when `mnemosyne run` launches it.
"""

import argparse
import hashlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

# The model is small and the example is about failures: run where everybody can.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.runtime.dataloader import RepeatingLoader  # noqa: E402
from deepspeed.utils import logger  # noqa: E402

from corpus import ByteCorpus, CorpusError, load_text  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

logger.setLevel(logging.ERROR)  # it warns about our scheduler's first step
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main() -> int:
    args = parse_args()
    rank = int(os.environ.get("RANK", "0"))
    shape = GPTConfig()
    try:
        corpus = ByteCorpus(load_text(args.data), shape.sequence_length)
    except CorpusError as error:
        # Every rank says so: the launcher ends the others as soon as one has failed.
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2

    torch.manual_seed(args.seed)
    model = GPT(shape)
    torch.manual_seed(args.seed + 1 + rank)  # each rank drops out other neurons
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        training_data=corpus,
        config=str(args.deepspeed_config),
    )
    loader.num_local_io_workers, loader.pin_memory = 0, False  # already in memory
    batches = RepeatingLoader(loader)
    if args.checkpoint_dir is not None and (args.checkpoint_dir / "latest").exists():
        engine.load_checkpoint(str(args.checkpoint_dir))
        for _ in range(engine.global_steps * engine.gradient_accumulation_steps()):
            next(batches)

    for step in range(engine.global_steps, args.steps):
        loss = train_step(engine, batches)
        append(args.time_log, f"{step} {rank} {time.time():.6f}")
        append(args.loss_log, f"{step} {rank} {loss.hex()}")
        if rank == 0 and (step % 5 == 0 or step == args.steps - 1):
            print(f"step {step:4d}  loss {loss:.4f}", flush=True)
        if args.save_every and (step + 1) % args.save_every == 0:
            engine.save_checkpoint(str(args.checkpoint_dir))
    append(args.final_state, f"{rank} {digest(engine)}")
    return 0


def train_step(engine: Any, batches: Any) -> float:
    """Make one optimizer step; return the mean loss of its micro-batches."""
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        x, y = next(batches)
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def append(path: Path | None, line: str) -> None:
    """Add a line to a file that all ranks share; one write is one whole line."""
    if path is None:
        return
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def digest(engine: Any) -> str:
    """Return the SHA-256 of all parameters and of the optimizer's state."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if torch.is_tensor(value):
            flat = value.detach().contiguous().flatten()
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    for name, parameter in engine.module.named_parameters():
        add(name)
        add(parameter)
    # With bf16 DeepSpeed wraps the optimizer, and that one owns fp32 parameters.
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in optimizer.param_groups:
        add(group["lr"])
        for parameter in group["params"]:
            add(parameter)
            for key, value in sorted(optimizer.state[parameter].items()):
                add(key)
                add(value)
    return sha.hexdigest()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--data", type=Path, help="file or folder of text")
    parser.add_argument("--loss-log", type=Path, help="file for: step, rank, loss")
    parser.add_argument("--time-log", type=Path, help="file for: step, rank, time")
    parser.add_argument("--final-state", type=Path, help="file for: rank, SHA-256")
    parser.add_argument("--checkpoint-dir", type=Path, help="resume from here")
    parser.add_argument("--save-every", type=int, default=0, help="steps, 0: never")
    parser.add_argument(
        "--deepspeed_config", type=Path, default=CONFIGS / "ds_config_gpt.json"
    )
    args = parser.parse_args()
    if args.save_every and args.checkpoint_dir is None:
        parser.error("--save-every needs --checkpoint-dir")
    return args


if __name__ == "__main__":
    sys.exit(main())
