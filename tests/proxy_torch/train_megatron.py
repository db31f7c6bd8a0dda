"""A GPT of megatron.core by torch's CUDA build, or on the CPU to compare with.

    mnemosyne run --device-proxy --nproc-per-node 2 train_megatron.py --tensor 2

The log gets a line for each step and rank, and a hash of all that training has changed.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

torch._dynamo.config.disable = True  # the proxy takes no kernels of triton

if not torch.cuda.is_available():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "megatron"))
    import cpu_cuda  # noqa: F401

import torch.distributed as dist  # noqa: E402
from killing import Killing  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
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
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    TransformerConfig,
)

from mnemosyne_plugin import recovery  # noqa: E402
from mnemosyne_plugin.megatron import attach  # noqa: E402

VOCABULARY, LENGTH, MICRO_BATCH, NUM_MICRO_BATCHES = 96, 32, 2, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Train as the arguments say."""
    options = parse()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(options.tensor, options.pipeline)
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, optimizer, scheduler = build(options)
    train_step = Step(model, optimizer, scheduler)
    session = None
    if recovery.current() is not None:
        session = attach([model], optimizer, scheduler)
    file = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    rank, data = dist.get_rank(), batches()
    killing = None
    first = session.step if session else 0
    for _ in range(first * NUM_MICRO_BATCHES):
        next(data)  # of a worker that was lost
    for step in range(first, options.steps):
        if step == 1 and rank == options.victim:  # snapshots are in place
            killing = Killing(rank, options.kill_within, options.fault)
        if killing is not None and step == options.steps - 1:
            killing.end()  # the script's own work behind its last step is not redone
        loss = session.run(train_step, data) if session else train_step(data)
        os.write(file, f"{step} {rank} {loss.hex()} {loss:.6f}\n".encode())
    os.write(file, f"digest {rank} {digest(model, optimizer)}\n".encode())


def build(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the model, its optimizer and the optimizer's scheduler."""
    dtype = DTYPES[options.dtype]
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=options.tensor,
        pipeline_model_parallel_size=options.pipeline,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=options.dtype == "bf16",
        hidden_dropout=options.dropout,
        attention_dropout=options.dropout,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=not options.random,
        sequence_parallel=False,
    )
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type=options.position,
    ).cuda()
    if options.dtype == "bf16":
        model = Float16Module(config, model)
    is_distributed = options.distributed_optimizer
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=is_distributed,
        overlap_grad_reduce=options.overlap,
        overlap_param_gather=options.overlap and is_distributed,
        bucket_size=20_000,
        grad_reduce_in_fp32=True,
    )
    model = DistributedDataParallel(config, ddp, model)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            min_lr=3e-4,
            clip_grad=1.0,
            bf16=options.dtype == "bf16",
            params_dtype=dtype,
            use_distributed_optimizer=is_distributed,
            overlap_param_gather=options.overlap and is_distributed,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=3e-3,
        min_lr=3e-4,
        lr_warmup_steps=3,
        lr_decay_steps=options.steps + 4,
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=options.steps,
        wd_incr_style="constant",
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if options.overlap:
        config.no_sync_func = model.no_sync
    return model, optimizer, scheduler


class Step:
    """One training step; returns the mean loss of all ranks."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        self._model, self._optimizer = model, optimizer
        self._scheduler = scheduler
        self._run = get_forward_backward_func()

    def __call__(self, data: Iterator[torch.Tensor]) -> float:
        """Take one, with the next micro-batches."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._run(
            forward_step_func=self._forward,
            data_iterator=data,
            model=self._model,
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        self._optimizer.step()
        self._scheduler.step(1)
        # Only the last stages of the pipeline have losses.
        total = sum(float(loss["lm loss"]) for loss in losses)
        sums = torch.tensor([total, float(len(losses))])
        if torch.cuda.is_available():
            sums = sums.cuda()
        dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / count

    def _forward(self, data: Iterator[torch.Tensor], model: Any) -> tuple[Any, Any]:
        tokens = next(data).cuda()
        positions = torch.arange(LENGTH, device=tokens.device).expand(MICRO_BATCH, -1)
        future = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1).cuda()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        output = model(inputs, positions, future, labels=labels)

        def mean(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            loss = output.float().mean()
            return loss, {"lm loss": loss.detach().clone()}

        return output, mean


def batches() -> Iterator[torch.Tensor]:
    """Yield the micro-batches of this data-parallel rank; most tokens can be told."""
    generator = torch.Generator()
    generator.manual_seed(7 + parallel_state.get_data_parallel_rank())
    while True:
        tokens = torch.randint(0, VOCABULARY, (MICRO_BATCH, 1), generator=generator)
        rows = [tokens]
        for _ in range(LENGTH):
            rows.append((rows[-1] * 5 + 7) % VOCABULARY)
        yield torch.cat(rows, 1)


def digest(model: Any, optimizer: Any) -> str:
    """Hash parameters, masters and moments."""
    tensors = list(model.parameters())
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            for master in group["params"]:
                state = inner.state[master]
                tensors += [master, *(state[name] for name in sorted(state))]
    hashed = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().reshape(-1)
        hashed.update(flat.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--overlap", action="store_true", help="reductions, gathers")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--random", action="store_true", help="weights by the device")
    parser.add_argument("--position", default="learned_absolute")
    parser.add_argument("--victim", type=int, default=-1, help="rank")
    parser.add_argument("--fault", default="kill")
    parser.add_argument("--kill-within", type=int, default=900)
    parser.add_argument("--log", default=os.devnull)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
