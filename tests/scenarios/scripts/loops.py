"""A small DeepSpeed script in the manner that the test asks for: LOOP says which."""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "deepspeed_gpt"))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.runtime.dataloader import RepeatingLoader  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import mnemosyne_plugin.data  # noqa: E402
from train import append, digest  # noqa: E402

NUM_EPOCHS, NUM_SAMPLES, BATCH = 4, 10, 2
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "mnemosyne": {"enabled": True},
}


class Noisy(torch.utils.data.Dataset):
    def __init__(self, num_readers=1):
        self.num_readers = num_readers

    def __len__(self):
        return NUM_SAMPLES * self.num_readers

    def __getitem__(self, index):
        return torch.full((8,), float(index)) + torch.rand(8)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        )

    def forward(self, x):
        return self.layers(x).square().mean()


def main(loop, folder):
    rank = int(os.environ["RANK"])
    torch.manual_seed(3)
    model = Net()
    torch.manual_seed(4 + rank)

    def initialize(data=None):
        return deepspeed.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            training_data=data,
            config=CONFIG,
        )[0]

    def train(engine, batch):
        step = engine.global_steps
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        append(folder / "losses.txt", f"{step} {rank} {loss.item().hex()}")

    if loop == "epochs of training_data":
        engine = initialize(Noisy(2))
        engine.training_dataloader.num_local_io_workers = 0
        for _ in range(NUM_EPOCHS):
            for batch in engine.training_dataloader:
                train(engine, batch)
    elif loop == "steps of a RepeatingLoader":
        engine = initialize()
        loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=1)
        loader = mnemosyne_plugin.data.resumable(loader)
        batches = iter(RepeatingLoader(loader))
        for _ in range(engine.global_steps, NUM_EPOCHS * NUM_SAMPLES // BATCH):
            train(engine, next(batches))
    elif loop == "epochs of resumable loaders":
        loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=2)
        loader = mnemosyne_plugin.data.resumable(loader)
        engine = initialize()
        evaluation = mnemosyne_plugin.data.resumable(DataLoader(Noisy(), shuffle=True))
        for _ in range(NUM_EPOCHS):
            for batch in loader:
                train(engine, batch)
            engine.eval()
            with torch.no_grad():
                for batch in evaluation:
                    engine(batch)
            engine.train()
    append(folder / "final.txt", f"{rank} {digest(engine)}")


main(os.environ["LOOP"], Path(os.environ["FOLDER"]))
