"""What a script's loop iterates over, and where it is in it.

A *pass* is one iteration over a loader, begun when its first batch is asked for. The
position of a loader is the number of its pass, the random state in which the pass
began, and the number of batches handed out in it.
"""

import functools
import hashlib
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mnemosyne_plugin import recovery
from mnemosyne_plugin.data.sources import Place, Source
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng


class Resumable:
    """Stands in for a loader; all but iteration goes to the loader itself."""

    def __init__(self, source: Source, *, catches_up: bool = True) -> None:
        self._source = source
        self._catches_up = catches_up
        self._next_pass = 0
        self._place: Place | None = None
        self._num_batches = 0
        self._sought: Place | None = None
        self._goal: Place | None = None
        self._take_rng: Callable[[], RngState] = capture_rng
        # Weak: worker processes are shut down badly if a cycle keeps their iterator.
        self._newest: Callable[[], _Pass | None] = lambda: None
        self._kept: _Pass | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # so that a copy of an empty shell does not recurse
            raise AttributeError(name)
        return getattr(self._source.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Scripts set attributes of the loader, such as the number of its workers.
        is_own = name.startswith("_") or hasattr(type(self), name)
        object.__setattr__(self if is_own else self._source.loader, name, value)

    def __len__(self) -> int:
        loader: Any = self._source.loader
        return len(loader)

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None and self._source.is_stream:
            return self._kept
        newest = _Pass(self)
        self._newest = weakref.ref(newest)
        if isinstance(self._source.loader, Iterator):  # then `next` may be all it gets
            self._kept = newest
        return newest

    def __next__(self) -> Any:
        """Return the next batch of the newest pass, for loaders read by ``next``."""
        if self._sought is not None:
            self.catches_up = False  # no loop over epochs does that
        return next(self._kept or iter(self))

    @property
    def catches_up(self) -> bool:
        """Whether the passes that are over are empty ones in a newcomer."""
        return self._catches_up

    @catches_up.setter
    def catches_up(self, value: bool) -> None:
        self._catches_up = value
        if not value and self._sought is not None:
            self._next_pass = self._sought.pass_number

    @property
    def epoch(self) -> int:
        """The pass in which the job is, for a loop that starts there."""
        self.catches_up = False
        return self._next_pass

    def get(self) -> Any:
        """Return the position behind the last batch handed out."""
        if self._place is None:
            return None
        begun = (self._place.pass_number, self._place.start, self._place.seed)
        return *begun, self._num_batches, self._source.state()

    def seek(self, position: Any, take_rng: Callable[[], RngState]) -> None:
        """Have this newcomer's loop arrive behind ``position``.

        take_rng: returns the random state for the batches behind it.
        """
        self._take_rng = take_rng
        if position is None:
            return
        self._sought = Place(*position)
        newest, begun = self._newest(), self._next_pass - 1
        if begun == self._sought.pass_number and newest is not None:
            # The script has read batches of this pass in its set-up, and goes on.
            self._next_pass = begun
            newest.begin_again()
        self.catches_up = self._catches_up

    def start_over(self) -> None:
        """Begin at the first batch: the script itself reads up to where the job is.

        There it goes on with the job's random state.
        """
        if self._sought is not None:
            self._goal, self._sought, self._next_pass = self._sought, None, 0

    def _look_for_goal(self) -> None:
        """Take the job's random state if all is read that the job has read."""
        goal, place = self._goal, self._place
        if goal is None or place is None or place.pass_number != goal.pass_number:
            return
        if self._num_batches == goal.num_batches:
            self._goal = None
            restore_rng(self._take_rng())
            self._take_rng = capture_rng

    def _begin(self) -> Iterator[Any] | None:
        """Begin the next pass; None if it is over already."""
        number, sought = self._next_pass, self._sought
        self._next_pass += 1
        if sought is not None and number < sought.pass_number:
            return None
        self._sought = None
        if self._goal is None:
            rng = self._take_rng()
            self._take_rng = capture_rng
        else:
            rng = capture_rng()
        num_begun, self._num_batches = self._num_batches, 0
        if sought is None:
            restore_rng(rng)
            start = pickle.dumps((rng, self._source.mark()))
            self._place = Place(number, start, _seed_of(rng, number))
            return self._source.begin(self._place)
        # What the set-up has read of a stream is not read again.
        num_read = num_begun if self._source.is_stream else 0
        self._place = sought
        self._num_batches = sought.num_batches
        start_rng, mark = pickle.loads(sought.start)
        restore_rng(start_rng)
        self._source.rewind(mark)
        behind = functools.partial(restore_rng, rng)
        left = sought.num_batches - num_read
        return self._source.resume(replace(sought, num_batches=left), behind)


class _Pass:
    """One pass over a loader."""

    def __init__(self, owner: Resumable) -> None:
        self._owner = owner
        self._batches: Iterator[Any] | None = None
        self._is_over = False

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> Any:
        owner = self._owner
        manager = recovery.current()
        if manager is not None:
            manager.phase("data")
        owner._look_for_goal()
        if self._batches is None and not self._is_over:
            self._batches = owner._begin()
        if self._batches is None:
            self._is_over = True
            raise StopIteration
        try:
            batch = next(self._batches)
        except StopIteration:
            self._is_over, self._batches = True, None
            raise
        owner._num_batches += 1
        owner._source.handed_out()
        return batch

    def begin_again(self) -> None:
        """Begin with the next batch that is asked for."""
        self._is_over, self._batches = False, None


def _seed_of(rng: RngState, pass_number: int) -> int:
    """Return a number of this pass, the same in a newcomer; draws nothing."""
    key = rng["torch"].numpy().tobytes() + pass_number.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "little")


class Positions:
    """The loaders of this process, in the order in which they were wrapped.

    Implements Position. A position that arrives before its loader waits for it.
    """

    def __init__(self) -> None:
        self._loaders: list[Resumable] = []
        self._sought: tuple[Any, ...] = ()
        self._rng: RngState | None = None

    def __bool__(self) -> bool:
        return bool(self._loaders)

    def add(self, loader: Resumable) -> None:
        """Take in a loader, which may have a position waiting for it."""
        self._loaders.append(loader)
        self._hand_over(len(self._loaders) - 1)

    def get(self) -> Any:
        """Return the positions of all loaders; a snapshot."""
        return tuple(loader.get() for loader in self._loaders)

    def seek(self, position: Any, rng: RngState) -> None:
        """Have each loader arrive behind its position; ``rng`` is the state there."""
        self._sought, self._rng = position, rng
        for number in range(len(self._loaders)):
            self._hand_over(number)

    def _hand_over(self, number: int) -> None:
        if number < len(self._sought):
            self._loaders[number].seek(self._sought[number], self._take_rng)

    def _take_rng(self) -> RngState:
        """Return the job's random state, once: who reads next goes on from there."""
        rng, self._rng = self._rng, None
        return capture_rng() if rng is None else rng


@functools.cache
def positions() -> Positions:
    """Return the positions of this process."""
    return Positions()
