"""Train a small Hugging Face GPT-2 on a text file with DeepSpeed."""

import argparse
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, set_seed


class TextDataset(Dataset):
    """Pieces of a text; a token is a byte."""

    def __init__(self, path, block_size):
        tokens = torch.tensor(list(Path(path).read_bytes()), dtype=torch.long)
        self.blocks = tokens[: len(tokens) // block_size * block_size]
        self.blocks = self.blocks.view(-1, block_size)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", default=__file__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--loss_file", default="losses.txt")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    deepspeed.init_distributed()
    set_seed(args.seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=args.block_size,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.gradient_checkpointing_enable()
    dataset = TextDataset(args.text, args.block_size)

    engine, optimizer, loader, scheduler = deepspeed.initialize(
        args=args,
        model=model,
        model_parameters=model.parameters(),
        training_data=dataset,
    )
    rank = torch.distributed.get_rank()
    engine.train()
    for epoch in range(args.epochs):
        for batch in loader:
            batch = {name: value.to(engine.device) for name, value in batch.items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            step = engine.global_steps - 1
            with open(args.loss_file, "a") as log:
                log.write(f"{step} {rank} {loss.item().hex()}\n")
            if rank == 0 and step % 10 == 0:
                print(f"epoch {epoch} step {step}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
