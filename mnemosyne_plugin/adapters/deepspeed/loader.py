"""DeepSpeed's training data loader, with a position that a newcomer can seek."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from mnemosyne_plugin.recovery.manager import Manager
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng


class PositionedLoader:
    """Stands in for the loader that ``deepspeed.initialize`` returns.

    The position is the number of batches handed out in the current pass over the data,
    and the random state in which its first batch was asked for (a sampler draws its
    order from it). Seeking skips samples at the sampler, so no data is read for it.
    Random augmentation inside of loader worker processes is not part of it.
    """

    def __init__(self, loader: Any, manager: Manager) -> None:
        self._loader = loader
        self._manager = manager
        self._pass_rng: RngState | None = None
        self._sampler_epoch: int | None = None
        self._num_batches = 0
        self._sought: tuple[Any, RngState] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Scripts set attributes of the loader, such as the number of its workers.
        object.__setattr__(self if name.startswith("_") else self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> "PositionedLoader":
        self._pass_rng = None
        self._num_batches = 0
        if self._sought is None:
            iter(self._loader)
            return self
        position, rng = self._sought
        self._sought = None
        self._pass_rng, self._sampler_epoch, self._num_batches = position
        sampler = self._loader.data_sampler
        if self._sampler_epoch is not None:
            sampler.set_epoch(self._sampler_epoch)
        self._loader.data_sampler = _Resumed(
            sampler, self._num_batches * self._loader.batch_size, self._pass_rng, rng
        )
        try:
            iter(self._loader)
        finally:
            self._loader.data_sampler = sampler
        return self

    def __next__(self) -> Any:
        self._manager.phase("data")
        if self._pass_rng is None:
            self._pass_rng = capture_rng()
            self._sampler_epoch = getattr(self._loader.data_sampler, "epoch", None)
        batch = next(self._loader)
        self._num_batches += 1
        return batch

    def get(self) -> Any:
        """Return the position behind the last batch handed out."""
        return self._pass_rng, self._sampler_epoch, self._num_batches

    def seek(self, position: Any, rng: RngState) -> None:
        """Let the next pass begin behind ``position``, in random state ``rng``."""
        if position[0] is not None:
            self._sought = (position, rng)


class _Resumed(torch.utils.data.Sampler[int]):
    """A sampler's order in the random state of its pass, without the first samples."""

    def __init__(
        self, sampler: Any, num_skipped: int, pass_rng: Any, rng: RngState
    ) -> None:
        self._sampler = sampler
        self._num_skipped = num_skipped
        self._pass_rng = pass_rng
        self._rng = rng

    def __iter__(self) -> Iterator[int]:
        restore_rng(self._pass_rng)
        order = iter(self._sampler)
        for _ in islice(order, self._num_skipped):
            pass
        restore_rng(self._rng)
        yield from order

    def __len__(self) -> int:
        return len(self._sampler)
