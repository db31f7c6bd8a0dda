"""A model and data of a few thousand numbers, with all that makes recovery hard.

Dropout, a buffer that forward mutates, frozen and tied parameters, two parameter
groups, and data that is shuffled and disturbed at random.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.sequence.layer import DistributedAttention
from torch import nn
from torch.nn.functional import cross_entropy, linear

WORDS, WIDTH, LENGTH = 24, 16, 6


class Embedding(nn.Module):
    """Words and places; the places are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH) * 0.3)
        places = torch.randn(LENGTH, WIDTH) * 0.1
        self.places = nn.Parameter(places, requires_grad=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.weight[words] + self.places[: words.shape[1]]


class Block(nn.Module):
    """A residual block that subtracts a running mean, which each forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.mean.to(x.dtype, copy=True)
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 1)).to(self.mean.dtype), 0.1)
            self.num_calls.add_(1)
        hidden = self.up(self.norm(x - mean))
        return x + self.down(self.drop(nn.functional.gelu(hidden)))


class Mixture(nn.Module):
    """Four experts, on as many ranks as there are parts; words choose theirs."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.moe = MoE(WIDTH, expert, num_experts=4, ep_size=num_parts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, balance, _ = self.moe(x)
        return x + output, 0.1 * balance


class Attention(nn.Module):
    """Attention over a sequence of which each rank of a group has a part."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.attend = DistributedAttention(_Heads(), group, scatter_idx=2, gather_idx=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).unflatten(-1, (3, 2, WIDTH // 2)).unbind(2)
        return x + self.attend(*heads, 0).flatten(2)


class _Heads(nn.Module):
    def forward(self, *heads: torch.Tensor) -> torch.Tensor:
        query, key, value = (head.transpose(1, 2) for head in heads)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return found.transpose(1, 2)


def logits(embedding: Embedding, x: torch.Tensor) -> torch.Tensor:
    """Return the scores of all words; the weight is that of the embedding."""
    return linear(x, embedding.weight)


def loss_of(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(scores.float().flatten(0, 1), target.flatten())


class Net(nn.Module):
    """The model in one piece; forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.blocks = nn.Sequential(Block(), Block())
        self.attention: nn.Module = nn.Identity()
        self.mixture: Mixture | None = None
        self.checkpoint: Callable[..., torch.Tensor] = lambda run, x: run(x)

    def forward(self, words: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.checkpoint(self.blocks, self.embedding(words))
        x, balance = self.attention(x), torch.zeros(())
        if self.mixture is not None:
            x, balance = self.mixture(x)
        return loss_of(logits(self.embedding, x), target) + balance


def pipeline(num_stages: int) -> PipelineModule:
    """Return the same model in stages; its first and last layer share a weight."""
    tied: dict[str, Any] = {"typename": Embedding, "tied_weight_attr": "weight"}
    layers = [
        TiedLayerSpec("embedding", **tied),
        LayerSpec(Block),
        LayerSpec(Block),
        TiedLayerSpec("embedding", forward_fn=logits, **tied),
    ]
    return PipelineModule(
        layers,
        num_stages=num_stages,
        loss_fn=loss_of,
        partition_method="uniform",
        activation_checkpoint_interval=1,
        checkpointable_layers=["Block"],
    )


class Sentences(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random words; each reading draws from Python's and numpy's random state."""

    def __init__(self, *, is_disturbed: bool = True) -> None:
        self._is_disturbed = is_disturbed

    def __len__(self) -> int:
        return 150  # no multiple of a step's batch: passes end within a step

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(WORDS, (LENGTH + 1,), generator=generator)
        if self._is_disturbed:
            words[random.randrange(LENGTH)] = int(numpy.random.randint(WORDS))
        return words[:-1], words[1:]


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: weights decay, the rest does not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    large = [p for p in parameters if p.dim() > 1]
    small = [p for p in parameters if p.dim() <= 1]
    return [
        {"params": large, "weight_decay": 0.1, "name": "large"},
        {"params": small, "weight_decay": 0.0, "name": "small"},
    ]
