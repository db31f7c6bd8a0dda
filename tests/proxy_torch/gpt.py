"""A small GPT, trained by torch's CUDA build under the device proxy.

Prints each loss as hexadecimal digits, a trace of the commands that its step sent, and
a hash of the parameters: two runs are alike when their output is. A server that ends in
between is replaced, the state comes back from a copy in host memory, and the step is
done again.

    python tests/proxy_torch/gpt.py --steps 20 --kill-within 400
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from mnemosyne_plugin import proxy
from mnemosyne_plugin.errors import FatalError
from mnemosyne_plugin.proxy import DeviceProxy

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


class Peers:
    """The other ranks, and how all of them go back together.

    An epoch ends when some rank says that its device is lost. A thread of each waits
    for that, and sees to it that nobody waits for a rank that will not come.
    """

    def __init__(self, device: DeviceProxy) -> None:
        self.device = device
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store, self.watched = self.connect(self.rank == 0), self.connect()
        self.epoch = 0
        self.lock = threading.Lock()  # of the group
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    @staticmethod
    def connect(is_master: bool = False) -> dist.Store:
        """Return one more connection to the store that all ranks meet at."""
        port = int(os.environ["MASTER_PORT"])
        return dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=is_master)

    def watch(self) -> None:
        """Notice the end of each epoch."""
        self.watched.set_timeout(timedelta(hours=1))
        for epoch in itertools.count():
            if self.watched.get(f"end/{epoch}/{self.rank}") == b"close":
                return
            self.is_over.set()
            self.device.refuse_communicators()
            with self.lock:
                dist.group.WORLD._get_backend(torch.device("cuda")).abort()
            self.watched.set(f"noticed/{epoch}/{self.rank}", "")
            self.watched.get(f"next/{epoch}/{self.rank}")

    def wait_for_all(self) -> None:
        """Wait until all ranks are here."""
        self.store.set(f"here/{self.rank}", "")
        self.store.wait([f"here/{rank}" for rank in range(self.size)])

    def close(self) -> None:
        """End the thread; all is done. The store is there until all have."""
        self.store.set(f"end/{self.epoch}/{self.rank}", "close")
        self.thread.join()
        self.store.set(f"closed/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"closed/{rank}" for rank in range(self.size)])

    def end_epoch(self) -> None:
        """Tell all ranks that they must go back."""
        for rank in range(self.size):
            self.store.set(f"end/{self.epoch}/{rank}", "lost")
        self.store.wait([f"noticed/{self.epoch}/{self.rank}"])

    def agree(self, step: int) -> int:
        """Return the earliest step of all ranks, and begin the next epoch."""
        self.store.set(f"step/{self.epoch}/{self.rank}", str(step))
        keys = [f"step/{self.epoch}/{rank}" for rank in range(self.size)]
        earliest = min(int(self.store.get(key)) for key in keys)
        self.is_over.clear()
        self.device.admit_communicators()
        self.epoch += 1
        self.store.set(f"next/{self.epoch - 1}/{self.rank}", "")
        return earliest

    def meet(self) -> None:
        """Have the group of all ranks, in place of the one of the last epoch."""
        store = self.connect()
        # Nothing else ends the wait for the id of a rank that has gone back again.
        store.set_timeout(timedelta(seconds=10))
        with self.lock:
            if dist.is_initialized():
                dist.destroy_process_group()
            dist.init_process_group(
                "nccl",
                store=dist.PrefixStore(f"group/{self.epoch}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=60),
            )


class Training:
    """A model with its optimizer, and copies of both from the last steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device(options.device)
        self.module = GPT(options.layers, options.dropout)
        if options.dtype == "bf16":
            self.module = self.module.bfloat16()
        self.module.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        self.addresses = [p.data_ptr() for p in self.module.parameters()]
        self.saved: dict[int, tuple[list[Tensor], Tensor | None]] = {}
        self.save(0)

    def begin(self) -> None:
        """Wrap the model; again after a loss, which may have cut a reduction short."""
        self.model: nn.Module = self.module
        if self.options.ddp:
            self.model = DistributedDataParallel(self.module, device_ids=[0])

    def tensors(self) -> list[Tensor]:
        """Return all that a step begins with."""
        found = [*self.module.parameters(), *self.module.buffers()]
        for state in self.optimizer.state.values():
            found += [state[key] for key in sorted(state)]
        return [tensor.detach() for tensor in found]

    def save(self, step: int, is_doomed: Callable[[], bool] = lambda: False) -> bool:
        """Copy it to host memory, as what `step` begins with."""
        copies = [tensor.cpu() for tensor in self.tensors()]
        draws = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        if is_doomed():
            return False
        self.saved[step] = copies, draws
        self.saved.pop(step - 2, None)  # another rank may be one step behind
        return True

    def restore(self, step: int) -> None:
        """Bring it back to where it was."""
        copies, draws = self.saved[step]
        self.optimizer.zero_grad(set_to_none=True)
        if len(copies) < len(self.tensors()):
            self.optimizer.state.clear()  # the first step made it
        for tensor, copy in zip(self.tensors(), copies, strict=True):
            tensor.copy_(copy)
        torch.cuda.set_rng_state(draws)
        torch.cuda.synchronize()
        assert self.addresses == [p.data_ptr() for p in self.module.parameters()]
        self.begin()

    def step(self, batches: list[Tensor]) -> float:
        """Take one step with the gradients of all batches; return the mean loss."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            there = batch.to(self.device, non_blocking=True)
            tokens, targets = there[:, :-1].contiguous(), there[:, 1:].contiguous()
            is_amp = self.options.dtype == "amp"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_amp):
                loss = self.model(tokens, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def digest(self, step: int) -> str:
        """Hash all that training has changed."""
        hashed = hashlib.sha256()
        for tensor in self.saved[step][0]:
            hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()[:16]


class Recovery:
    """Goes back to the last step that all have done."""

    def __init__(
        self, options: argparse.Namespace, device: DeviceProxy, peers: Peers | None
    ) -> None:
        self.options, self.device, self.peers = options, device, peers
        self.draw = random.Random(options.seed + int(os.environ.get("RANK", 0)))
        self.num_servers = 0
        self.killer = threading.Timer(0, device.kill)  # of the server in use

    def is_needed(self) -> bool:
        """Whether the device is lost, or that of another rank."""
        if self.device.is_lost or self.peers is None:
            return self.device.is_lost
        return self.peers.is_over.is_set() or self.device.communicator_error() != 0

    def start_server(self, step: int) -> None:
        """Start one that dies at one of its first operations, unless it is late."""
        fault = ""
        is_late = (
            step >= self.options.steps - 3 or self.num_servers > self.options.kills
        )
        if self.options.kill_within and not is_late:
            at = self.draw.randrange(self.options.kill_within)
            number = self.device.generation
            fault = f"fault=kill,{at=},server={number + 1}"
        os.environ["MNEMOSYNE_EMULATED"] = fault
        self.num_servers += 1
        self.device.recover(60)
        if self.options.kill_after and not is_late:
            after = self.draw.uniform(0, self.options.kill_after)
            self.killer = threading.Timer(after, self.device.kill)
            self.killer.start()

    def run(self, training: Training, step: int) -> int:
        """Bring the state back; return the step to do again."""
        while True:
            try:
                if self.peers is not None:
                    self.peers.end_epoch()
                while self.device.is_lost:
                    with contextlib.suppress(FatalError):
                        self.start_server(step)
                if self.peers is not None:
                    step = self.peers.agree(step)
                    self.peers.meet()
                training.restore(step)
                return step
            except RuntimeError:
                if not self.is_needed():
                    raise


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
    parser.add_argument(
        "--kill-after",
        type=float,
        default=0,
        help="each server but the first is killed after a random one of that many "
        "seconds: the way for a device that has no faults by order",
    )
    parser.add_argument("--kills", type=int, default=100, help="at most")
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(options.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False

    torch.backends.cuda.enable_cudnn_sdp(False)  # has no host function
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(options.attention == "flash")
    device, peers = proxy.loaded(), None
    if options.ddp:
        peers = Peers(device)
        peers.meet()
    training = Training(options)
    training.begin()
    if peers is not None:
        peers.wait_for_all()  # nobody's device is lost before all can go back
    train(options, training, Recovery(options, device, peers) if device else None)
    if peers is not None:
        peers.close()
        dist.destroy_process_group()


def train(
    options: argparse.Namespace, training: Training, recovery: Recovery | None
) -> None:
    """Do all steps, some of them again; then print what they gave."""
    source = batches(options)
    read: dict[int, list[Tensor]] = {}
    losses: dict[int, tuple[float, int]] = {}
    if options.kill_within or options.kill_after:
        recovery.device.kill()  # what is before is not to be repeated
    step = 0
    while step < options.steps:
        if step not in read:
            read[step] = next(source)
            read.pop(step - 2, None)
        try:
            if recovery is not None:
                recovery.device.take_trace()
            loss = training.step(read[step])
            trace = recovery.device.take_trace() if recovery is not None else 0
            is_done = options.counts or training.save(
                step + 1, recovery.is_needed if recovery else bool
            )
        except RuntimeError:
            if recovery is None or not recovery.is_needed():
                raise
            is_done = False
        if is_done:
            # The first step of a process makes what later ones find, and DDP's first
            # ones measure; it is made anew behind a loss.
            losses[step] = loss, trace if step and not options.ddp else 0
            step += 1
        if recovery is not None and (recovery.is_needed() or not is_done):
            step = recovery.run(training, step)
    if recovery is not None:
        recovery.killer.cancel()
    for step, (loss, trace) in losses.items():
        print(step, struct.pack(">d", loss).hex(), f"{loss:.6f} {trace:016x}")
    if options.counts:
        print("counts", *itertools.islice(recovery.device.counts().values(), 3))
    else:
        print("digest", training.digest(options.steps))
    if recovery is not None:
        print(f"recoveries {recovery.num_servers}", file=sys.stderr)


if __name__ == "__main__":
    main()
