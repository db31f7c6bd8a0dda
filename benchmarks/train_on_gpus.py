"""The workload on GPUs: a GPT in bf16, by DeepSpeed over NCCL, of any size.

Under `mnemosyne run` it is protected; under torchrun it resumes from its checkpoints.
"""

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/deepspeed_gpt"))

from model import GPT, GPTConfig  # noqa: E402

logger.setLevel(logging.ERROR)
NUM_MICRO_BATCHES = 2


def main() -> None:
    args = parse_args()
    # The device proxy has none of cuDNN; both kinds of job get the same attention.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Ranks may share a GPU, by NCCL 2.30.
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    place = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(place)
    # DeepSpeed would split its groups from the first one: the device proxy cannot.
    torch.cuda.set_device(place)
    torch.distributed.init_process_group("nccl")
    deepspeed.init_distributed("nccl")
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(
            num_layers=args.layers,
            num_heads=args.heads,
            hidden=args.hidden,
            sequence_length=args.length,
            vocab_size=args.vocabulary,
            dropout=0.0,
        )
    )
    torch.manual_seed(2 + rank)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config=config(args),
    )
    if args.checkpoint_dir is not None and (args.checkpoint_dir / "latest").exists():
        engine.load_checkpoint(str(args.checkpoint_dir))
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    log = os.open(args.time_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    data = batches(args, engine.device, rank, engine.global_steps * NUM_MICRO_BATCHES)
    for step in range(engine.global_steps, args.steps):
        for _ in range(NUM_MICRO_BATCHES):
            loss = engine(*next(data))
            engine.backward(loss)
            engine.step()
        loss.item()  # the time is that of the device
        os.write(log, f"{step} {rank} {time.time():.6f}\n".encode())
        if args.save_every and (step + 1) % args.save_every == 0:
            engine.save_checkpoint(str(args.checkpoint_dir))


def config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": args.stage,
            "reduce_bucket_size": args.bucket,
            "allgather_bucket_size": args.bucket,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "checkpoint": {"tag_validation": "IGNORE"},
        "steps_per_print": 1_000_000_000,
        "mnemosyne": {"enabled": args.protected},
    }


def batches(
    args: argparse.Namespace, device: torch.device, rank: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random tokens, [micro-batch, length], and those that follow each.

    first: how many micro-batches there were before.
    """
    generator = torch.Generator().manual_seed(rank)
    shape = (64, args.micro_batch, args.length + 1)
    tokens = torch.randint(args.vocabulary, shape, generator=generator).to(device)
    for batch in itertools.islice(itertools.cycle(tokens), first, None):
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--time-log", type=Path, required=True)
    parser.add_argument("--checkpoint-dir", type=Path)
    parser.add_argument("--save-every", type=int, default=0, help="steps, 0: never")
    parser.add_argument("--protected", action="store_true")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    # Those of GPT-2.
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--bucket", type=int, default=500_000_000, help="elements")
    return parser.parse_args()


if __name__ == "__main__":
    main()
