"""A sought loader hands out what the lost one would have, in the same random state."""

import importlib
from typing import Any

import pytest
import torch

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime.dataloader import (  # noqa: E402
    DeepSpeedDataLoader,
    RepeatingLoader,
)

from mnemosyne_plugin.adapters.deepspeed.loader import hook_loaders  # noqa: E402
from mnemosyne_plugin.data import resumable  # noqa: E402
from mnemosyne_plugin.data.loops import Positions  # noqa: E402
from mnemosyne_plugin.errors import ConfigError  # noqa: E402
from mnemosyne_plugin.state.rng import capture_rng, restore_rng  # noqa: E402


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that draw random numbers when they are read."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


@pytest.fixture(autouse=True)
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RepeatingLoader, "__init__", RepeatingLoader.__init__)
    hook_loaders(importlib.import_module("deepspeed.runtime.dataloader"))


def loader(is_distributed: bool, num_workers: int = 0) -> Any:
    return DeepSpeedDataLoader(
        Noisy(),
        batch_size=2,
        pin_memory=False,
        local_rank=0 if is_distributed else -1,
        tput_timer=None,
        num_local_io_workers=num_workers,
        data_parallel_world_size=2,
        data_parallel_rank=1,
    )


@pytest.mark.parametrize("is_distributed", [True, False])
@pytest.mark.parametrize("is_training_noisy", [True, False])
@pytest.mark.parametrize("is_wrapped_outside", [True, False])
def test_every_position_can_be_sought(
    is_distributed: bool,
    is_training_noisy: bool,
    is_wrapped_outside: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def repeating() -> tuple[Any, Positions]:
        where = Positions()
        monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)
        bare = loader(is_distributed)
        if is_wrapped_outside:
            return resumable(RepeatingLoader(bare)), where
        return RepeatingLoader(resumable(bare)), where

    def take(batches: Any) -> torch.Tensor:
        batch = next(batches)
        if is_training_noisy:
            torch.rand(3)  # dropout
        return batch

    torch.manual_seed(5)
    batches, where = repeating()
    marks, seen = [], []
    for _ in range(20):
        seen.append(take(batches))
        marks.append((where.get(), capture_rng()))
    last = torch.rand(2)
    for number, (position, rng) in enumerate(marks[:-1]):
        torch.manual_seed(77)  # a newcomer's own
        rest, newcomer = repeating()
        restore_rng(rng)
        newcomer.seek(position, rng)
        for expected in seen[number + 1 :]:
            assert torch.equal(take(rest), expected)
        assert torch.equal(torch.rand(2), last)
        assert newcomer.get()[0][3] == marks[-1][0][0][3]


def test_a_loop_over_epochs_catches_up_with_worker_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(sought: Any) -> list[tuple[torch.Tensor, Any]]:
        where, seen = Positions(), []
        monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)
        torch.manual_seed(5)
        batches = resumable(loader(False, num_workers=1))
        if sought is not None:
            where.seek(*sought)
        for _ in range(2):
            for batch in batches:
                seen.append((batch, (where.get(), capture_rng())))
        return seen

    whole = run(None)
    rest = run(whole[8][1])
    assert len(rest) == len(whole) - 9 > 0
    for (batch, _), (want, _) in zip(rest, whole[9:], strict=True):
        assert torch.equal(batch, want)


def test_next_of_the_loader_itself_starts_in_the_pass_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(sought: Any) -> list[tuple[torch.Tensor, Any]]:
        where, seen = Positions(), []
        monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)
        torch.manual_seed(5)
        batches = resumable(loader(True))
        if sought is not None:
            where.seek(*sought)
        while len(seen) < 9:
            try:
                batch = next(batches)
            except StopIteration:
                iter(batches)
                continue
            seen.append((batch, (where.get(), capture_rng())))
        return seen

    whole = run(None)
    rest = run(whole[6][1])  # in the third pass
    assert torch.equal(rest[0][0], whole[7][0])
    assert torch.equal(rest[1][0], whole[8][0])


def test_curriculum_learning_is_refused() -> None:
    bare = loader(False)
    bare.curriculum_learning_enabled = True
    with pytest.raises(ConfigError, match="curriculum"):
        resumable(bare)
