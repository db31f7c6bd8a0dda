"""A byte-level GPT, small enough for a laptop's CPU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """The shape of the model; the default has 0.5 M parameters."""

    num_layers: int = 4
    num_heads: int = 4
    hidden: int = 96
    sequence_length: int = 128
    vocab_size: int = 256
    dropout: float = 0.1


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each with a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.feed_forward_norm = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.residual_dropout(self._attend(self.attention_norm(x)))
        return x + self.residual_dropout(self.feed_forward(self.feed_forward_norm(x)))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class GPT(nn.Module):
    """Predicts the next byte; ``forward`` returns the mean cross-entropy."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.positions = nn.Embedding(config.sequence_length, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.apply(_initialize)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x and y: int64 [batch, length]; y is x moved by one byte."""
        positions = torch.arange(x.size(1), device=x.device)
        hidden = self.dropout(self.tokens(x) + self.positions(positions))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        # In float even when the model runs in bf16: the loss is compared bit by bit.
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
