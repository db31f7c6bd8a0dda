"""Train the matrix's model: a plain DeepSpeed script that knows nothing of us.

It logs each step's loss together with short digests of all that a step changes, so
that a difference is found in the step that made it, and is named.
"""

import argparse
import functools
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.dataloader import RepeatingLoader  # noqa: E402
from deepspeed.runtime.sequence_parallel import parallel_state_sp  # noqa: E402
from deepspeed.utils import logger  # noqa: E402
from facts import append, digest  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

from model import (  # noqa: E402
    Attention,
    Mixture,
    Net,
    Sentences,
    groups,
    pipeline,
)

logger.setLevel(logging.ERROR)
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALARS = (bool, int, float, str, type(None))


def main() -> None:
    args = parse_args()
    if args.claim_fp16:
        # Without it DeepSpeed refuses fp16 on a CPU that has no instructions for it,
        # though torch can compute it.
        get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
    seed_all(1)
    model = pipeline(args.stages) if args.stages else net(args)
    seed_all(2 + rank // args.sequence_parts)
    train = train_in_one_piece
    if args.stages:
        train = train_in_stages
    elif args.sequence_parts > 1:
        train = train_on_parts
    engine, steps = train(args, model)
    for step, (loss, inputs) in zip(
        range(engine.global_steps, args.steps), steps, strict=False
    ):
        parts = {name: digest(part)[:8] for name, part in state(engine).items()}
        facts = {"loss": loss.hex(), "inputs": digest(inputs)[:8], **parts}
        line = ",".join(f"{name}:{value}" for name, value in facts.items())
        append(args.loss_log, f"{step} {rank} {line}")
    append(args.final_state, f"{rank} {digest(state(engine))}")


def net(args: argparse.Namespace) -> Net:
    """Return the model in one piece, made in the manner that is asked for."""
    sharded = deepspeed.zero.Init(
        config_dict_or_path=str(args.deepspeed_config), enabled=args.zero_init
    )
    with sharded:
        model = Net()
    if args.expert_parts:
        model.mixture = Mixture(args.expert_parts)
    if args.sequence_parts > 1:
        parallel_state_sp.initialize_sequence_parallel(args.sequence_parts)
        model.attention = Attention(parallel_state_sp.get_sequence_parallel_group())
    if args.freeze_blocks:
        for name, parameter in model.blocks.named_parameters():
            parameter.requires_grad_("norm" in name)
    if args.checkpoint_blocks:
        model.checkpoint = functools.partial(
            checkpoint, use_reentrant=args.checkpoint_blocks == "reentrant"
        )
    return model


def train_in_one_piece(
    args: argparse.Namespace, model: Any
) -> tuple[Any, Iterator[tuple[float, Any]]]:
    """Return the engine, and its steps: the loss and inputs of each."""
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        training_data=Sentences(),
        config=str(args.deepspeed_config),
    )
    loader.num_local_io_workers, loader.pin_memory = 0, False
    return engine, three_calls(engine, RepeatingLoader(loader))


def train_on_parts(
    args: argparse.Namespace, model: Any
) -> tuple[Any, Iterator[tuple[float, Any]]]:
    """The same with a part of each sequence, by Ulysses."""
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        mpu=parallel_state_sp,
        config=str(args.deepspeed_config),
    )
    num_parts = args.sequence_parts
    replica, part = divmod(engine.global_rank, num_parts)
    # A newcomer reads its first batch in front of the step, in no known random state.
    data = Sentences(is_disturbed=False)
    batches = resumed(engine, data, engine.world_size // num_parts, replica)
    parts = ([x.chunk(num_parts, 1)[part] for x in batch] for batch in batches)
    return engine, three_calls(engine, parts)


def three_calls(engine: Any, batches: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    """Make one step after the other; yield the loss and the inputs of each."""
    while True:
        losses, inputs = [], []
        for _ in range(engine.gradient_accumulation_steps()):
            words, target = next(batches)
            loss = engine(words, target)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            inputs.append(words)
        yield sum(losses) / len(losses), inputs


def train_in_stages(
    args: argparse.Namespace, model: Any
) -> tuple[Any, Iterator[tuple[float, Any]]]:
    """The same for a PipelineModule; its first step is found as after a resume."""
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config=str(args.deepspeed_config),
    )
    grid = engine.grid
    batches = resumed(
        engine,
        Sentences(),
        grid.get_data_parallel_world_size(),
        grid.get_data_parallel_rank(),
    )

    def steps() -> Iterator[tuple[float, Any]]:
        while True:
            yield engine.train_batch(batches).item(), ()

    return engine, steps()


def resumed(engine: Any, data: Sentences, num_replicas: int, rank: int) -> Any:
    """Return batches from where the engine is on, found as after a resume."""
    sampler: Any = DistributedSampler(data, num_replicas=num_replicas, rank=rank)
    micro_batch = engine.train_micro_batch_size_per_gpu()
    batches = RepeatingLoader(
        DataLoader(data, micro_batch, sampler=sampler, drop_last=True)
    )
    for _ in range(engine.global_steps * engine.gradient_accumulation_steps()):
        next(batches)
    return batches


def state(engine: Any) -> dict[str, Any]:
    """Return all that a step changes on this rank, by name; its own shards of it."""
    wrapper = engine.optimizer
    optimizer = getattr(wrapper, "optimizer", wrapper)
    # ZeRO 3 empties the groups of the torch optimizer between its steps.
    masters = getattr(wrapper, "fp32_partitioned_groups_flat", None) or [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    scalers = [
        getattr(wrapper, name, None) for name in ("loss_scaler", "loss_scale_config")
    ]
    return {
        # Of ZeRO 3, a parameter's own shard.
        "params": [getattr(p, "ds_tensor", p) for p in engine.module.parameters()],
        "buffers": list(engine.module.buffers()),
        "masters": masters,
        "moments": [sorted(optimizer.state[p].items()) for p in masters],
        "lr": [group["lr"] for group in optimizer.param_groups],
        "scaler": [scalars_of(scaler) for scaler in scalers if scaler is not None],
        "scheduler": sorted(scalars_of(engine.lr_scheduler)),
        "counters": [getattr(engine, name) for name in _COUNTERS],
        "rng": torch.get_rng_state(),
        "numpy": [numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]],
        "python": random.getstate(),
    }


def scalars_of(owner: Any) -> list[tuple[str, Any]]:
    values = sorted(vars(owner).items())
    return [(name, value) for name, value in values if isinstance(value, _SCALARS)]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stages", type=int, default=0, help="0: no pipeline")
    parser.add_argument("--zero-init", action="store_true", help="born in shards")
    parser.add_argument("--freeze-blocks", action="store_true", help="but their norms")
    parser.add_argument("--checkpoint-blocks", choices=["reentrant", "not-reentrant"])
    parser.add_argument("--expert-parts", type=int, default=0, help="0: no experts")
    parser.add_argument("--sequence-parts", type=int, default=1, help="by Ulysses")
    parser.add_argument("--claim-fp16", action="store_true", help="fp16 on any CPU")
    parser.add_argument("--loss-log", type=Path, required=True)
    parser.add_argument("--final-state", type=Path, required=True)
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
