"""Train a byte-level GPT with megatron.core: tensor, pipeline and data parallel.

    mnemosyne run --nproc-per-node=8 --standby=1 examples/megatron_gpt/train_core.py \
        --tensor=2 --pipeline=2 --data=build/corpus

What protects it are two lines: ``attach`` in front of the loop, and ``session.run``
around the step. It runs on the CPU where torch has no GPU.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

if not torch.cuda.is_available():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "megatron"))
    import cpu_cuda  # noqa: F401

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (  # noqa: E402
    GPTDataset,
    GPTDatasetConfig,
)
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import (  # noqa: E402
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import (  # noqa: E402
    OptimizerParamScheduler,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    TransformerConfig,
)

from mnemosyne_plugin.megatron import attach  # noqa: E402

VOCABULARY, LENGTH, MICRO_BATCH, NUM_MICRO_BATCHES = 256, 64, 2, 4


def main() -> None:
    args = arguments().parse_args()
    model, optimizer, scheduler, dataset = set_up(args)

    session = attach([model], optimizer, scheduler)
    batches = micro_batches(dataset, session.step)
    train_step = make_train_step(model, optimizer, scheduler)
    for step in range(session.step, args.steps):
        loss = session.run(train_step, batches)
        log(args, step, loss)


def set_up(args: argparse.Namespace) -> tuple[Any, Any, Any, GPTDataset]:
    """Return the model, the optimizer, its scheduler and the dataset."""
    dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")
    parallel_state.initialize_model_parallel(args.tensor, args.pipeline)
    torch.manual_seed(args.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    model, optimizer, scheduler = build(args)
    return model, optimizer, scheduler, build_dataset(args)


def build(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tensor,
        pipeline_model_parallel_size=args.pipeline,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    )
    is_distributed = not args.plain_optimizer
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=is_distributed)
    model = DistributedDataParallel(config, ddp_config, gpt)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            min_lr=3e-4,
            clip_grad=1.0,
            use_distributed_optimizer=is_distributed,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=3e-3,
        min_lr=3e-4,
        lr_warmup_steps=5,
        lr_decay_steps=max(args.steps, 6),
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=args.steps,
        wd_incr_style="constant",
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer, scheduler


def build_dataset(args: argparse.Namespace) -> GPTDataset:
    """Return Megatron's own dataset over what prepare.py has written."""
    tokenizer = SimpleNamespace(
        vocab_size=VOCABULARY, eod=0, pad=-1, unique_identifiers={"class": "bytes"}
    )
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=LENGTH,
        blend=([str(args.data)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=f"{args.data}.cache",
    )
    count = args.steps * NUM_MICRO_BATCHES * MICRO_BATCH
    count *= parallel_state.get_data_parallel_world_size()
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [count, 0, 0], lambda: True, config
    )
    dataset, _, _ = builder.build()
    return dataset


def micro_batches(dataset: Any, first_step: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this data-parallel rank's micro-batches, from a step on."""
    size = parallel_state.get_data_parallel_world_size()
    place = parallel_state.get_data_parallel_rank()
    number = first_step * NUM_MICRO_BATCHES * size + place
    while True:
        begin = number * MICRO_BATCH
        items = [dataset[begin + item] for item in range(MICRO_BATCH)]
        yield {name: torch.stack([item[name] for item in items]) for name in items[0]}
        number += size


def make_train_step(model: Any, optimizer: Any, scheduler: Any) -> Any:
    run = get_forward_backward_func()

    def forward(data: Any, model: Any) -> tuple[Any, Any]:
        batch = next(data)
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
        )

        def mean(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            loss = output.float().mean()
            return loss, {"lm loss": loss.detach().clone()}

        return output, mean

    def train_step(batches: Any) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward,
            data_iterator=batches,
            model=model,
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
        # Only the last stages of the pipeline have losses.
        total = sum(float(loss["lm loss"]) for loss in losses)
        sums = torch.tensor([float(total), float(len(losses))])
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    return train_step


def log(args: argparse.Namespace, step: int, loss: float) -> None:
    """Write a step's loss where it was asked for, and show some of them."""
    rank = dist.get_rank()
    append(args.time_log, f"{step} {rank} {time.time():.6f}")
    append(args.loss_log, f"{step} {rank} {loss.hex()}")
    if rank == 0 and (step % 5 == 0 or step == args.steps - 1):
        print(f"step {step:4d}  loss {loss:.4f}", flush=True)


def append(path: Path | None, line: str) -> None:
    """Add a line to a file that all ranks share; one write is one whole line."""
    if path is None:
        return
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="see prepare.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument(
        "--plain-optimizer",
        action="store_true",
        help="each data-parallel rank has all of the optimizer's state",
    )
    parser.add_argument("--loss-log", type=Path, help="add each step's exact loss")
    parser.add_argument("--time-log", type=Path, help="add when each step was done")
    return parser


if __name__ == "__main__":
    main()
