"""A small GPT, trained by torch's CUDA build under the device proxy.

Prints each loss as hexadecimal digits, and a hash of the parameters: two runs are alike
when their output is. A server that ends in between is replaced, the state comes back
from a copy in host memory, and the step is done again.

    python tests/proxy_torch/gpt.py --steps 20 --kill-within 400
"""

import argparse
import ctypes
import hashlib
import os
import random
import struct
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 96
LENGTH = 32
WIDTH = 64
HEADS = 4


class Block(nn.Module):
    """Attention and a perceptron, each behind its normalisation."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.between = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length, width] to the same."""
        batch, length, _ = x.shape
        heads = self.qkv(self.before(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.down(F.gelu(self.up(self.between(x)))))


class GPT(nn.Module):
    """Tokens to the loss of the next ones."""

    def __init__(self, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Map tokens and targets, [batch, length] each, to a scalar."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.tokens(tokens) + self.places(places))
        logits = self.head(self.norm(hidden)).float()
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


class Text(Dataset[Tensor]):
    """Sequences in which each token follows from the one before, mostly."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        """Return LENGTH + 1 tokens, the same for the same index."""
        draw = random.Random(self.seed * 1_000_003 + index)
        token = draw.randrange(VOCABULARY)
        tokens = [token]
        for _ in range(LENGTH):
            token = (5 * token + 7) % VOCABULARY if draw.random() < 0.9 else 0
            tokens.append(token)
        return torch.tensor(tokens)


class Proxy:
    """The client in this process."""

    HEALTHY, LOST = 1, 2

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)

    @property
    def state(self) -> int:
        """Say whether the server is there."""
        return int(self.library.mnemosyne_proxy_state())

    @property
    def num_servers(self) -> int:
        """Return how many there were."""
        return int(self.library.mnemosyne_proxy_generation())

    def recover(self) -> None:
        """Start a new server; memory is at its old addresses, with nothing in it."""
        while self.library.mnemosyne_proxy_recover(60_000) != 0:
            if self.state != self.LOST:
                raise RuntimeError(f"no new server: state={self.state}")

    def remake_communicators(self, store: dist.Store, generation: str) -> None:
        """Agree with the other ranks on new ids for the communicators of all."""
        handles = (ctypes.c_void_p * 16)()
        sizes, ranks = (ctypes.c_int * 16)(), (ctypes.c_int * 16)()
        ids = ctypes.create_string_buffer(16 * 128)
        count = self.library.mnemosyne_proxy_comms(handles, sizes, ranks, ids, 16)
        for at in range(count):
            key = f"{generation}/{ids.raw[at * 128 : at * 128 + 128].hex()}"
            unique_id = ctypes.create_string_buffer(128)
            if ranks[at] == 0:
                check(self.library.ncclGetUniqueId(unique_id))
                store.set(key, unique_id.raw)
            else:
                unique_id.raw = store.get(key)
            remake = self.library.mnemosyne_proxy_reinit_comm
            check(remake(ctypes.c_void_p(handles[at]), unique_id))


def check(result: int) -> None:
    """Raise what NCCL returned."""
    if result != 0:
        raise RuntimeError(f"ncclResult_t {result}")


class Training:
    """A model with its optimizer, and the copy of both from the last step."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        model = GPT(options.layers, options.dropout)
        if options.dtype == "bf16":
            model = model.bfloat16()
        self.device = torch.device(options.device)
        self.model: nn.Module = model.to(self.device)
        self.is_amp = options.dtype == "amp"
        self.is_kept = not options.counts
        if options.ddp:
            self.model = DistributedDataParallel(self.model, device_ids=[0])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        self.addresses = [p.data_ptr() for p in self.model.parameters()]
        self.save()

    def tensors(self) -> list[Tensor]:
        """Return all that a step begins with."""
        found = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            found += [state[key] for key in sorted(state)]
        return [tensor.detach() for tensor in found]

    def save(self) -> None:
        """Copy it to host memory."""
        self.saved = [tensor.cpu() for tensor in self.tensors()]
        self.random = torch.cuda.get_rng_state() if self.device.type == "cuda" else None

    def restore(self) -> None:
        """Bring it back to where it was."""
        self.optimizer.zero_grad(set_to_none=True)
        if len(self.saved) < len(self.tensors()):
            self.optimizer.state.clear()  # the first step made it
        for tensor, saved in zip(self.tensors(), self.saved, strict=True):
            tensor.copy_(saved)
        torch.cuda.set_rng_state(self.random)
        torch.cuda.synchronize()
        assert self.addresses == [p.data_ptr() for p in self.model.parameters()]

    def step(self, batches: list[Tensor]) -> float:
        """Take one step with the gradients of all batches; return the mean loss."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            there = batch.to(self.device, non_blocking=True)
            tokens, targets = there[:, :-1].contiguous(), there[:, 1:].contiguous()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_amp):
                loss = self.model(tokens, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss_value = total.item()
        if self.is_kept:
            self.save()
        return loss_value

    def digest(self) -> str:
        """Hash all that training has changed."""
        hashed = hashlib.sha256()
        for tensor in self.saved:
            hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()[:16]


def batches(options: argparse.Namespace) -> Iterator[list[Tensor]]:
    """Return those of each step: as many as gradients are accumulated of."""
    size = options.steps * options.accumulate * options.batch
    loader = DataLoader(
        Text(size, options.seed + 7919 * int(os.environ.get("RANK", 0))),
        batch_size=options.batch,
        num_workers=options.workers,
        pin_memory=options.pin,
    )
    source = iter(loader)
    for _ in range(options.steps):
        yield [next(source) for _ in range(options.accumulate)]


def schedule_kill(draw: random.Random, within: int, number: int) -> None:
    """Have the next server die at one of its first operations."""
    if within > 0:
        at = draw.randrange(within)
        # Only that one: it may die before it has all memory.
        os.environ["MNEMOSYNE_EMULATED"] = f"fault=kill,at={at},server={number}"


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["bf16", "amp", "fp32"], default="bf16")
    parser.add_argument("--attention", choices=["math", "flash"], default="flash")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--ddp", action="store_true", help="with torchrun's variables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--counts", action="store_true", help="of the proxy's calls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kill-within",
        type=int,
        default=0,
        help="each server but the first dies at a random one of that many operations",
    )
    parser.add_argument("--kills", type=int, default=100, help="at most")
    options = parser.parse_args()

    torch.backends.cuda.enable_cudnn_sdp(False)  # has no host function
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(options.attention == "flash")
    proxy = Proxy()
    draw = random.Random(options.seed)
    num_recoveries = 0
    if options.ddp:
        dist.init_process_group("nccl", timeout=timedelta(seconds=60))
    training = Training(options)
    if options.kill_within > 0:
        # From here on; what is before is not to be repeated.
        proxy.library.mnemosyne_proxy_kill()
    for step, step_batches in enumerate(batches(options)):
        loss = None
        while loss is None:
            try:
                if num_recoveries and proxy.state != Proxy.HEALTHY:
                    raise RuntimeError("lost before the step")
                loss = training.step(step_batches)
            except RuntimeError:
                if proxy.state == Proxy.HEALTHY:
                    raise
                loss = None
            while loss is None and proxy.state != Proxy.HEALTHY:
                num_recoveries += 1
                is_last = num_recoveries >= options.kills
                within = 0 if is_last else options.kill_within
                schedule_kill(draw, within, proxy.num_servers + 1)
                if is_last:
                    os.environ["MNEMOSYNE_EMULATED"] = ""
                proxy.recover()
                try:
                    training.restore()
                except RuntimeError:
                    if proxy.state == Proxy.HEALTHY:
                        raise
        print(step, struct.pack(">d", loss).hex(), f"{loss:.6f}", flush=True)
    print("digest", training.digest(), flush=True)
    if options.counts:
        counts = (ctypes.c_uint64 * 4)()
        proxy.library.mnemosyne_proxy_counts(counts)
        print("counts", *counts[:3])
    print(f"recoveries {num_recoveries}", file=sys.stderr)
    if options.ddp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
