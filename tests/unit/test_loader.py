"""A sought loader hands out what the lost one would have, in the same random state."""

from typing import Any

import pytest
import torch

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime.dataloader import (  # noqa: E402
    DeepSpeedDataLoader,
    RepeatingLoader,
)

from mnemosyne_plugin.adapters.deepspeed.loader import PositionedLoader  # noqa: E402
from mnemosyne_plugin.state.rng import capture_rng, restore_rng  # noqa: E402


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that draw random numbers when they are read."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


class FakeManager:
    def phase(self, name: str) -> None:
        pass


def loader(is_distributed: bool) -> Any:
    inner = DeepSpeedDataLoader(
        Noisy(),
        batch_size=2,
        pin_memory=False,
        local_rank=0 if is_distributed else -1,
        tput_timer=None,
        num_local_io_workers=0,
        data_parallel_world_size=2,
        data_parallel_rank=1,
    )
    return PositionedLoader(inner, FakeManager())  # type: ignore[arg-type]


@pytest.mark.parametrize("is_distributed", [True, False])
@pytest.mark.parametrize("is_training_noisy", [True, False])
def test_every_position_can_be_sought(
    is_distributed: bool, is_training_noisy: bool
) -> None:
    def take(batches: Any) -> torch.Tensor:
        batch = next(batches)
        if is_training_noisy:
            torch.rand(3)  # dropout
        return batch

    torch.manual_seed(5)
    whole = loader(is_distributed)
    batches = RepeatingLoader(whole)
    marks, seen = [], []
    for _ in range(14):
        seen.append(take(batches))
        marks.append((whole.get(), capture_rng()))
    last = torch.rand(2)
    for number, (position, rng) in enumerate(marks[:-1]):
        torch.manual_seed(77)  # a newcomer's own
        newcomer = loader(is_distributed)
        restore_rng(rng)
        newcomer.seek(position, rng)
        rest = RepeatingLoader(newcomer)
        for expected in seen[number + 1 :]:
            assert torch.equal(take(rest), expected)
        assert torch.equal(torch.rand(2), last)
        assert newcomer.get()[2] == marks[-1][0][2]
