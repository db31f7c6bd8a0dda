"""The GPT of gpt.py by DeepSpeed under `mnemosyne run`, over NCCL.

    mnemosyne run --device-proxy --nproc-per-node 2 train_deepspeed.py --victim 1

Each server of the victim dies, or hangs, at a random one of its first operations. The
log gets a line for each step and rank, and a hash of all that training has changed.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import gpt
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from killing import Killing
from torch import Tensor, nn

PROXY = {"enabled": True, "timeout_s": 2}
# DeepSpeed writes parameters into a line that it does not print: by many kernels.
torch._tensor_str._str = lambda *_, **__: "a tensor"


class Experts(nn.Module):
    """Four experts, two on each of two ranks; tokens choose theirs."""

    def __init__(self) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(gpt.WIDTH, gpt.WIDTH), nn.GELU())
        self.moe = MoE(gpt.WIDTH, expert, 4, ep_size=2)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length, width] to the same."""
        output, self.balance, _ = self.moe(x)
        return x + output


class Model(nn.Module):
    """The GPT, behind a layer that nothing trains, from tokens in host memory."""

    def __init__(self, has_experts: bool) -> None:
        super().__init__()
        self.gpt = gpt.GPT(2, 0.1)
        self.experts = Experts() if has_experts else None
        if self.experts is not None:
            self.gpt.blocks.append(self.experts)
        self.gpt.tokens.weight.requires_grad_(False)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, there and in host memory."""
        there = batch.cuda(non_blocking=True)
        loss = self.gpt(there[:, :-1].contiguous(), there[:, 1:].contiguous())
        if self.experts is not None:
            loss = loss + 0.1 * self.experts.balance
        self.num_calls += 1
        return loss, loss.detach().cpu()


def config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the ds_config."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": options.stage,
            # The default takes 2 GB, which each new server has to fill.
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.dtype == "bf16"},
        "mnemosyne": {} if options.plain else {"device_proxy": PROXY},
    }


def state(engine: Any) -> Iterator[Tensor]:
    """Yield all that training has changed."""
    yield from engine.module.parameters()
    yield from engine.module.buffers()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for parameter, values in optimizer.state.items():
        yield parameter
        yield from (values[name] for name in sorted(values))


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="do not ask for the proxy")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--victim", type=int, default=-1, help="rank")
    parser.add_argument("--first", type=int, default=1, help="step with a loss")
    parser.add_argument("--fault", default="kill")
    parser.add_argument("--kill-within", type=int, default=900)
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # has no host function
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    os.environ["LOCAL_RANK"] = "0"  # each process has the one emulated device
    deepspeed.init_distributed()
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = Model(options.experts)
    optimizer = torch.optim.AdamW(model.gpt.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        config=config(options),
    )
    torch.manual_seed(2 + rank)
    killing = None
    file = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def log(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    text = argparse.Namespace(
        steps=options.steps, accumulate=2, batch=4, seed=1, workers=2, pin=False
    )
    for step, batches in enumerate(gpt.batches(text)):
        if step < engine.global_steps:
            continue  # of a worker that was lost
        if rank == options.victim and step == options.first:
            killing = Killing(rank, options.kill_within, options.fault)
        if killing is not None and step == options.steps - 1:
            killing.end()  # the script's own work behind its last step is not redone
        losses = []
        for batch in batches:
            loss, copy = engine(batch)
            engine.backward(loss)
            engine.step()
            losses.append(float(copy).hex())
        assert is_lost_or(loss, float(copy))
        log(step, rank, *losses, engine.global_steps, engine.get_lr()[0].hex())
    log("digest", rank, hash_of(state(engine)))


def hash_of(tensors: Iterable[Tensor]) -> str:
    """Hash their values."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().reshape(-1)
        hashed.update(flat.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def is_lost_or(loss: Tensor, value: float) -> bool:
    """Whether a loss on the device is what it was, if it is there to be read."""
    try:
        return float(loss.detach()) == value
    except RuntimeError:
        return True  # the server has just died with it


if __name__ == "__main__":
    main()
