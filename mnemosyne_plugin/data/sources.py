"""How a pass over a loader is begun anew, or behind its first batches."""

import copy
import functools
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mnemosyne_plugin.state.rng import capture_rng, restore_rng


@dataclass(frozen=True, slots=True)
class Place:
    """The position of one loader."""

    pass_number: int
    start: bytes
    """The random state at the begin of the pass, and the source's marks; pickled."""
    seed: int
    """For the random draws of worker processes in the pass."""
    num_batches: int = 0
    """Handed out in the pass."""
    state: bytes = b""
    """The source's own position, if it keeps one."""


class Source:
    """Any iterable: what was read of it is read again and dropped."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    @property
    def description(self) -> str:
        """What it is and what comes back, for the user."""
        return (
            f"a {type(self.loader).__name__}: a newcomer reads again what was read, "
            "which is exact if that gives the same"
            + ("" if not self._keeps_workers() else "; NOT random draws in its workers")
        )

    def _keeps_workers(self) -> bool:
        return bool(getattr(self.loader, "persistent_workers", False))

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once, so that all is one pass."""
        return isinstance(self.loader, Iterator)

    def mark(self) -> Any:
        """Return what the next pass depends on, besides the random state. Picklable."""
        return _marks(self._samplers())

    def rewind(self, mark: Any) -> None:
        """Go back to ``mark``."""
        _put_back(self._samplers(), mark)

    def begin(self, start: Place) -> Iterator[Any]:
        """Begin a pass."""
        return iter(self.loader)

    def resume(self, start: Place, behind: Callable[[], None]) -> Iterator[Any]:
        """Return the batches behind ``start``; call ``behind`` in front of the first.

        The random state and ``mark`` are those of the begin of the pass.
        """
        batches = self.begin(start)
        for _ in islice(batches, start.num_batches):
            pass
        behind()
        return batches

    def handed_out(self) -> None:
        """Note that the loop has got one more batch."""

    def state(self) -> bytes:
        """Return the source's own position, if it keeps one."""
        return b""

    def _samplers(self) -> list[Any]:
        """Return whatever may have a generator or an epoch of its own."""
        found = [self.loader, getattr(self.loader, "sampler", None)]
        found.append(getattr(self.loader, "batch_sampler", None))
        return [place for place in found if place is not None]


class TorchSource(Source):
    """A DataLoader over a map-style dataset: skips batches at the sampler.

    With worker processes the random draws of a batch must not depend on the batches
    before it: a newcomer's workers never read those. So the generators are seeded
    for each batch, by a number that travels with its indices.
    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        super().__init__(loader)
        self._ordered: DataLoader[Any] | None = None
        self._had_workers = False

    @property
    def description(self) -> str:
        loader: Any = self.loader
        return f"a {type(loader).__name__}, {workers(loader.num_workers)}"

    def mark(self) -> Any:
        return super().mark(), self._has_workers()

    def rewind(self, mark: Any) -> None:
        marks, self._had_workers = mark
        super().rewind(marks)

    def begin(self, start: Place) -> Iterator[Any]:
        return self._begin(_Cut(start.seed))

    def resume(self, start: Place, behind: Callable[[], None]) -> Iterator[Any]:
        before = None
        if self._had_workers and not self._has_workers():
            # They start now, which draws; in the pass of the job they went on.
            rng, marks = capture_rng(), super().mark()

            def before() -> None:
                restore_rng(rng)
                super(TorchSource, self).rewind(marks)

        return self._begin(_Cut(start.seed, start.num_batches, before, behind))

    def _has_workers(self) -> bool:
        return getattr(self._ordered, "_iterator", None) is not None

    def _begin(self, cut: "_Cut") -> Iterator[Any]:
        if self._ordered is None:  # one for all passes: it may keep its workers
            self._ordered = self._with_order()
        self._order.cut = cut
        return iter(self._ordered)

    def _with_order(self) -> "DataLoader[Any]":
        loader: Any = self.loader
        name = "batch_sampler" if loader._auto_collation else "sampler"
        self._order = _Order(getattr(loader, name), loader.num_workers > 0)
        ordered: DataLoader[Any] = copy.copy(loader)
        # In its __dict__, for a DataLoader refuses to have these replaced.
        vars(ordered)[name] = self._order
        if loader.num_workers > 0:
            vars(ordered)["dataset"] = _Seeded(loader.dataset)
        return ordered


class StatefulSource(Source):
    """A loader with ``state_dict`` and ``load_state_dict``, such as torchdata's."""

    _state = b""

    @property
    def description(self) -> str:
        text = f"a {type(self.loader).__name__}, by its own state_dict"
        if not getattr(self.loader, "num_workers", 0):
            return text
        return f"{text}; NOT random draws in its worker processes"

    def begin(self, start: Place) -> Iterator[Any]:
        self._state = b""
        return super().begin(start)

    def resume(self, start: Place, behind: Callable[[], None]) -> Iterator[Any]:
        self._state = start.state
        loader: Any = self.loader
        loader.load_state_dict(pickle.loads(self._state))
        batches: Iterator[Any] = iter(loader)
        behind()
        return batches

    def handed_out(self) -> None:
        # Now, because after the last batch it would be the begin of the next pass.
        loader: Any = self.loader
        self._state = pickle.dumps(loader.state_dict())

    def state(self) -> bytes:
        return self._state


def workers(count: int) -> str:
    """Say how many workers a loader has."""
    if not count:
        return "read in the training process"
    return f"{count} worker processes, whose generators are seeded for each batch"


@functools.singledispatch
def source_of(loader: Any) -> Source:
    """Return the source for a loader; adapters register those of their trainer."""
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return StatefulSource(loader)
    if isinstance(loader, DataLoader) and not isinstance(
        loader.dataset, IterableDataset
    ):
        return TorchSource(loader)
    return Source(loader)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the next pass begins."""

    seed: int
    num_skipped: int = 0
    before: Callable[[], None] | None = None
    """Called before the sampler is asked for anything."""
    behind: Callable[[], None] | None = None
    """Called when the skipped batches are through."""


class _Order:
    """A sampler's order, without what was handed out in the pass before."""

    def __init__(self, sampler: Any, is_numbered: bool) -> None:
        self.cut: _Cut | None = None
        self._sampler = sampler
        self._is_numbered = is_numbered

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        # Let go of it: workers are shut down badly if a cycle keeps their iterator.
        cut, self.cut = self.cut, None
        assert cut is not None
        if cut.before is not None:
            cut.before()
        order = iter(self._sampler)
        for _ in islice(order, cut.num_skipped):
            pass
        if cut.behind is not None:
            cut.behind()
        seed, first = cut.seed, cut.num_skipped
        del cut
        if not self._is_numbered:
            yield from order
            return
        for number, indices in enumerate(order, first):
            yield _Numbered(indices, seed + number)


@dataclass(frozen=True, slots=True)
class _Numbered:
    """The indices of one batch (or one index), and the seed for reading them."""

    indices: Any
    seed: int


class _Seeded:
    """A dataset in a worker process, seeded anew for each batch."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        place = self if name == "_dataset" else self._dataset
        object.__setattr__(place, name, value)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, numbered: _Numbered) -> Any:
        _seed(numbered.seed)
        return self._dataset[numbered.indices]

    def __getitems__(self, numbered: _Numbered) -> Any:
        _seed(numbered.seed)
        together = getattr(self._dataset, "__getitems__", None)
        if together:
            return together(numbered.indices)
        return [self._dataset[index] for index in numbered.indices]


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _marks(places: list[Any]) -> list[Any]:
    """Return the epoch, and the state of the generator, of each place."""
    marks = []
    for place in places:
        generator = getattr(place, "generator", None)
        state = None
        if isinstance(generator, torch.Generator):
            state = generator.get_state()
        epoch = getattr(place, "epoch", None) if hasattr(place, "set_epoch") else None
        marks.append((state, epoch))
    return marks


def _put_back(places: list[Any], marks: list[Any]) -> None:
    for place, (state, epoch) in zip(places, marks, strict=True):
        if state is not None:
            place.generator.set_state(state)
        if epoch is not None:
            place.set_epoch(epoch)
