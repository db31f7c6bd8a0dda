"""Train a GPT of megatron.core on the CPU, protected by ``attach``.

It logs each step's loss together with short digests of all that a step changes, so
that a difference is found in the step that made it, and is named.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "megatron"))

import cpu_cuda  # noqa: E402, F401
import numpy  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from facts import append, digest  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.optimizer import (  # noqa: E402
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import (  # noqa: E402
    OptimizerParamScheduler,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    TransformerConfig,
)
from megatron.core.utils import get_batch_on_this_cp_rank  # noqa: E402
from megatron_model import (  # noqa: E402
    DTYPES,
    LENGTH,
    VOCABULARY,
    build_chunks,
    transformer_config,
)

from mnemosyne_plugin.megatron import attach  # noqa: E402

MICRO_BATCH, NUM_MICRO_BATCHES = 2, 4
SPIKE = 1e9
"""A loss times this has gradients that fp16 cannot hold."""


def main() -> None:
    args = parse_args()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        args.tensor,
        args.pipeline,
        virtual_pipeline_model_parallel_size=args.virtual or None,
        context_parallel_size=args.context,
        expert_model_parallel_size=args.expert,
        num_distributed_optimizer_instances=args.instances,
    )
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(args)
    chunks = build_chunks(args, config)
    optimizer, scheduler = build_optimizer(args, config, chunks)
    session = attach(chunks, optimizer, scheduler)
    train_step = Step(args, config, chunks, optimizer, scheduler)
    iterators: Any = [batches(session.step) for _ in chunks]
    for step in range(session.step, args.steps):
        data = iterators if args.virtual else iterators[0]
        has_spike = args.spike is not None and step % 3 == args.spike
        loss = session.run(train_step, data, has_spike)
        parts = state(chunks, optimizer, scheduler)
        short = {name: digest(part)[:8] for name, part in parts.items()}
        facts = {"loss": loss.hex(), **short}
        line = ",".join(f"{name}:{value}" for name, value in facts.items())
        append(args.loss_log, f"{step} {dist.get_rank()} {line}")
    final = digest(state(chunks, optimizer, scheduler))
    append(args.final_state, f"{dist.get_rank()} {final}")


def build_optimizer(
    args: argparse.Namespace, config: TransformerConfig, chunks: list[Any]
) -> tuple[Any, Any]:
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=1e-4,
            clip_grad=0.5,
            bf16=args.dtype == "bf16",
            fp16=args.dtype == "fp16",
            initial_loss_scale=2.0**10,
            loss_scale_window=2,
            hysteresis=1,
            params_dtype=DTYPES[args.dtype],
            use_distributed_optimizer=args.distributed_optimizer,
            overlap_param_gather=args.overlap and args.distributed_optimizer,
        ),
        chunks,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-4,
        lr_warmup_steps=4,
        lr_decay_steps=args.steps,
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=args.steps,
        wd_incr_style="constant",
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap:
        syncs = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = syncs if args.virtual else syncs[0]
    return optimizer, scheduler


class Step:
    """One training step; returns the mean loss over all ranks."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: TransformerConfig,
        chunks: list[Any],
        optimizer: Any,
        scheduler: Any,
    ) -> None:
        self._is_interleaved = bool(args.virtual)
        self._chunks = chunks
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._run = get_forward_backward_func()
        self._positions = torch.arange(LENGTH).expand(MICRO_BATCH, -1).contiguous()
        future = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
        self._mask = torch.triu(future, 1)
        self._has_spike = False

    def __call__(self, data: Any, has_spike: bool) -> float:
        self._has_spike = has_spike
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._run(
            forward_step_func=self._forward,
            data_iterator=data,
            model=self._chunks if self._is_interleaved else self._chunks[0],
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            decoder_seq_length=LENGTH,
            forward_only=False,
        )
        has_stepped, _, _ = self._optimizer.step()
        if has_stepped:
            self._scheduler.step(1)
        total = torch.stack([torch.zeros(()), *(loss["lm"] for loss in losses)]).sum()
        dist.all_reduce(total)
        return float(total)

    def _forward(self, data: Any, model: Any) -> tuple[Any, Any]:
        words = next(data)
        batch = {
            "inputs": words[:, :-1].contiguous(),
            "labels": words[:, 1:].contiguous(),
            "positions": self._positions,
            "attention_mask": self._mask,
        }
        here = get_batch_on_this_cp_rank(batch)
        mask, labels = here["attention_mask"], here["labels"]
        output = model(here["inputs"], here["positions"], mask, labels=labels)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            mean = output.float().mean()
            lm = mean.detach().clone()
            return (mean * SPIKE if self._has_spike else mean), {"lm": lm}

        return output, loss


def batches(first_step: int) -> Iterator[torch.Tensor]:
    """Yield the micro-batches of this data-parallel rank, from a step on."""
    place = parallel_state.get_data_parallel_rank()
    number = first_step * NUM_MICRO_BATCHES
    while True:
        generator = torch.Generator().manual_seed(1000 * number + place)
        shape = (MICRO_BATCH, LENGTH + 1)
        yield torch.randint(0, VOCABULARY, shape, generator=generator)
        number += 1


def state(chunks: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Return all that a step changes on this rank, by name; its own shards of it."""
    parts = optimizer.chained_optimizers
    inner = [part.optimizer for part in parts]
    masters = [p for o in inner for group in o.param_groups for p in group["params"]]
    states = [o.state[p] for o in inner for g in o.param_groups for p in g["params"]]
    scalers = [getattr(part, "grad_scaler", None) for part in parts]
    aux = moe_utils.get_moe_layer_wise_logging_tracker()
    is_gathered = not chunks[0].ddp_config.overlap_param_gather
    return {
        # Where gathering overlaps, the next forward completes them.
        "params": [p for c in chunks for p in c.parameters()] if is_gathered else (),
        "masters": masters,
        "moments": [sorted(values.items()) for values in states],
        "buffers": [buffer for c in chunks for _, buffer in c.named_buffers()],
        "aux": {name: each["values"] for name, each in aux.items()},
        "scaler": [s.state_dict() for s in scalers if s is not None],
        "lr": [group["lr"] for o in inner for group in o.param_groups],
        "scheduler": scheduler.num_steps,
        "rng": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "numpy": [numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]],
        "python": random.getstate(),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--virtual", type=int, default=0, help="chunks of each rank")
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--instances", type=int, default=1, help="of the optimizer")
    parser.add_argument("--dispatcher", default="", help="of experts; none: no experts")
    parser.add_argument("--expert-bias", action="store_true", help="balance by it")
    parser.add_argument("--spike", type=int, help="step, modulo 3, that overflows")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--overlap", action="store_true", help="reductions, gathers")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--loss-log", type=Path, required=True)
    parser.add_argument("--final-state", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
