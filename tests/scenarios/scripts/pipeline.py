"""Train a classifier in two pipeline stages with DeepSpeed."""

import argparse

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.utils.data import Dataset


class Spirals(Dataset):
    """Points of three spirals, each moved a little whenever it is read."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index % 3
        radius = torch.tensor(index / self.length)
        angle = 4 * radius + label * 2.1
        point = torch.stack([radius * angle.cos(), radius * angle.sin()])
        return point + 0.02 * torch.randn(2), torch.tensor(label)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--loss_file", default="losses.txt")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    layers = [LayerSpec(nn.Linear, 2, 32), nn.Tanh(), nn.Dropout(0.1)]
    for _ in range(2):
        layers += [LayerSpec(nn.Linear, 32, 32), nn.Tanh(), nn.Dropout(0.1)]
    layers += [LayerSpec(nn.Linear, 32, 3)]
    model = PipelineModule(
        layers=layers, num_stages=args.stages, loss_fn=nn.CrossEntropyLoss()
    )

    engine, _, _, _ = deepspeed.initialize(
        args=args,
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        training_data=Spirals(60),
    )
    for step in range(engine.global_steps, args.steps):
        loss = engine.train_batch()
        with open(args.loss_file, "a") as log:
            log.write(f"{step} {engine.global_rank} {loss.item().hex()}\n")


if __name__ == "__main__":
    main()
