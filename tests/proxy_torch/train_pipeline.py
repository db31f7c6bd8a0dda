"""Blocks of gpt.py in DeepSpeed's pipeline of two stages, over NCCL.

    MNEMOSYNE_DEVICE_GROUPS=nccl mnemosyne run --nproc-per-node 2 train_pipeline.py

The log gets a line for each step and rank, and a hash of all that training has changed.
"""

import argparse
import os
from typing import Any

import deepspeed
import gpt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from train_deepspeed import config, hash_of, state

NUM_MICRO_BATCHES, MICRO_BATCH = 2, 4  # as the ds_config says


class Embedding(nn.Module):
    """Tokens and their places; the last stage has the tokens' weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(gpt.VOCABULARY, gpt.WIDTH) * 0.02)
        self.places = nn.Embedding(gpt.LENGTH, gpt.WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [batch, length] to [batch, length, width]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return F.embedding(tokens, self.weight) + self.places(places)


def logits(embedding: Embedding, hidden: Tensor) -> Tensor:
    """Return the scores of all tokens."""
    return F.linear(hidden, embedding.weight)


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss."""
    return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--log", default=os.devnull)
    parser.set_defaults(plain=True)
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # has no host function
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    os.environ["LOCAL_RANK"] = "0"  # each process has the one emulated device
    deepspeed.init_distributed()
    rank = dist.get_rank()
    torch.manual_seed(1)
    tied: dict[str, Any] = {"typename": Embedding, "tied_weight_attr": "weight"}
    model = PipelineModule(
        [
            TiedLayerSpec("embedding", **tied),
            LayerSpec(gpt.Block, 0.1),
            LayerSpec(gpt.Block, 0.1),
            TiedLayerSpec("embedding", forward_fn=logits, **tied),
        ],
        num_stages=2,
        loss_fn=loss_of,
        partition_method="uniform",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(options)
    )
    torch.manual_seed(2 + rank)
    file = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def log(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    # Both ranks read the same data: the first stage its tokens, the last the targets.
    size = MICRO_BATCH * NUM_MICRO_BATCHES * options.steps
    text = torch.stack([gpt.Text(size, 1)[index] for index in range(size)])
    batches = ((b[:, :-1], b[:, 1:]) for b in text.split(MICRO_BATCH))
    for _ in range(NUM_MICRO_BATCHES * engine.global_steps):
        next(batches)  # of a worker that was lost
    for step in range(engine.global_steps, options.steps):
        loss = float(engine.train_batch(batches))
        log(step, rank, loss.hex(), engine.global_steps)
    log("digest", rank, hash_of(state(engine)))


if __name__ == "__main__":
    main()
