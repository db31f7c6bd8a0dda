"""A pretrain_gpt.py on the CPU: Megatron-LM's own ``pretrain``, on a small dataset.

It is written as the script of the same name in Megatron-LM's source tree, and knows
nothing of us. megatron.training comes from PYTHONPATH: PyPI has it in wheels for
Python 3.12, whose Python files run under 3.11 as well (see wheels.py).
"""

import hashlib
import importlib
import inspect
import multiprocessing
import os
from pathlib import Path
from typing import Any

import cpu_cuda

cpu_cuda.claim_gpus()

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
)
from megatron.training import arguments, get_args, pretrain, training  # noqa: E402
from megatron.training.arguments import (  # noqa: E402
    core_transformer_config_from_args,
)


class Words(torch.utils.data.Dataset[torch.Tensor]):
    """Random words, the same on every rank."""

    def __init__(self, size: int, length: int, vocabulary: int) -> None:
        self._size = size
        self._length = length
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        shape = (self._length + 1,)
        return torch.randint(0, self._vocabulary, shape, generator=generator)


def get_batch(data_iterator: Any) -> torch.Tensor:
    """Return the words of a micro-batch: the first tensor-parallel rank reads them."""
    args = get_args()
    if mpu.get_tensor_model_parallel_rank() == 0:
        words = next(data_iterator)
    else:
        words = torch.empty(
            args.micro_batch_size, args.seq_length + 1, dtype=torch.int64
        )
    torch.distributed.broadcast(
        words,
        mpu.get_tensor_model_parallel_src_rank(),
        group=mpu.get_tensor_model_parallel_group(),
    )
    return words


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **kwargs: Any,
) -> Any:
    args = get_args()
    if args.num_experts:
        cpu_cuda.have_experts()
    return GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(args.num_experts),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=True,
        vp_stage=vp_stage,
    )


def forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    words = get_batch(data_iterator)
    inputs, labels = words[:, :-1].contiguous(), words[:, 1:].contiguous()
    length = inputs.shape[1]
    positions = torch.arange(length).expand(len(inputs), -1).contiguous()
    future = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    output = model(inputs, positions, future, labels=labels)

    def loss_func(output: torch.Tensor) -> tuple[Any, ...]:
        loss = torch.sum(output.float().view(-1))
        num_tokens = torch.tensor(labels.numel(), dtype=torch.int)
        report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
        return loss, num_tokens, {"lm loss": report}

    return output, loss_func


def datasets(sizes: list[int], vp_stage: int | None = None) -> list[Words]:
    args = get_args()
    shape = (args.seq_length, args.padded_vocab_size)
    return [Words(size or 1, *shape) for size in sizes]


datasets.is_distributed = True  # type: ignore[attr-defined]


def log_losses(path: Path) -> None:
    """Have each step's exact loss, and what the optimizer made, in a file."""
    train_step = training.train_step

    def logging(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        loss, norm = result[0].get("lm loss"), result[5]
        sha = hashlib.sha256()
        for chunk in args[2]:
            for parameter in chunk.parameters():
                sha.update(parameter.data.view(-1).view(torch.uint8).numpy().tobytes())
        facts = f"loss:{exact(loss)},norm:{exact(norm)},params:{sha.hexdigest()[:8]}"
        line = f"{get_args().curr_iteration} {torch.distributed.get_rank()} {facts}\n"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, line.encode())
        os.close(file)
        return result

    train = training.train

    def logged(*args: Any, **kwargs: Any) -> Any:
        nonlocal train_step
        # Here, for --mnemosyne has put its own in place by now.
        train_step, training.train_step = training.train_step, logging
        return train(*args, **kwargs)

    training.train = logged


def hold_writers(fifo: Path) -> None:
    """Have the writers of the checkpoint of that name wait for its other end."""
    strategies = "megatron.core.dist_checkpointing.strategies"
    module = importlib.import_module(f"{strategies}.filesystem_async")
    writers = module.FileSystemWriterAsync
    write = writers.write_preloaded_data

    def held(*args: Any, write_bucket: Any, **kwargs: Any) -> Any:
        if Path(write_bucket[0]).parent.name == fifo.name:
            fifo.read_bytes()
        return write(*args, write_bucket=write_bucket, **kwargs)

    writers.write_preloaded_data = held


# Here, for the processes that write import this as well.
if name := os.environ.get("HELD_SAVE"):
    hold_writers(Path(name))


def exact(value: Any) -> str:
    """Return the bits of a number; ranks without a loss, overflows without a norm."""
    return "-" if value is None else float(value).hex()


def main() -> None:
    if path := os.environ.get("LOSS_LOG"):
        log_losses(Path(path))
    kind = ModelType.encoder_or_decoder
    parameters = inspect.signature(pretrain).parameters
    if "cfg_container" not in parameters:  # 0.16 and 0.17 parse inside
        pretrain(datasets, model_provider, kind, forward_step)
        return
    args = arguments.parse_and_validate_args()
    utils = importlib.import_module("megatron.training.argument_utils")
    config = utils.pretrain_cfg_container_from_args(args)
    if list(parameters)[2] == "model_provider":  # 0.18
        pretrain(config, datasets, model_provider, kind, forward_step)
    else:
        pretrain(config, datasets, kind, forward_step, model_provider=model_provider)


if __name__ == "__main__":
    # A second process that writes need not import it all again.
    multiprocessing.set_forkserver_preload(["cpu_cuda", "megatron.training"])
    main()
