"""A step that the plugin owns as a whole, made redoable.

Pipelines and Megatron make a step in one call, its collectives included. So a failure
unwinds it as an exception, and the call is made again with the same micro-batches.
A lost device is an exception as well; it takes micro-batches along that were on it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mnemosyne_plugin.adapters.lost_device import Copies, ResultCopies
from mnemosyne_plugin.adapters.redo import Commit, Redo, free_unwound_step
from mnemosyne_plugin.errors import FatalError
from mnemosyne_plugin.recovery.commit import Outcome
from mnemosyne_plugin.recovery.manager import Manager
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng
from mnemosyne_plugin.state.torch_state import Buffers


class StepState(Protocol):
    """What a trainer's step changes besides the shard, and how that is undone."""

    @property
    def buffers(self) -> Buffers:
        """The buffers that forward mutates."""

    def begin(self) -> None:
        """Note what the step will change in front of its mutation."""

    def end(self) -> None:
        """The step is made."""

    def undo(self) -> None:
        """Drop all that an unwound step has left."""


@dataclass(slots=True)
class _Step:
    """What a redo needs of one step."""

    number: int
    make: Callable[[], Any]
    rng: RngState
    batches: dict[int, list[tuple[Any, RngState]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """What each data iterator gave, and the random state behind it."""
    copies: list[Copies] = field(default_factory=list)
    """Of the batches, where the device may be lost."""
    result: Any = None
    kept_result: ResultCopies | None = None


class WholeStep:
    """Makes one step after the other."""

    def __init__(self, manager: Manager, state: StepState) -> None:
        self._manager = manager
        self._state = state
        self._steps: list[_Step] = []  # those that may have to be made again
        self._is_in_step = False  # the last one is under way
        self._current: _Step | None = None
        self._num_taken: Counter[int] = Counter()
        self._generation = manager.device_generation  # that holds the batches
        self._lost_batch: FatalError | None = None
        self.commit = Commit(manager)
        """To be called in front of the first mutation of each step."""

    def run(self, make: Callable[[], Any]) -> Any:
        """Make one step, by ``make``, and return what that returned.

        ``make`` may be called more than once, also in a later ``run``: each time with
        the same random state, buffers and micro-batches.
        """
        while self._manager.begin() is Outcome.REDO:
            self.catch_up()
        self._steps.append(_Step(self._manager.version, make, capture_rng()))
        self._is_in_step = True
        step = self._steps[-1]
        try:
            self._make(step)
        except Redo:
            self.catch_up()
        self._is_in_step = False
        return step.result

    def take(self, iterator: int, fetch: Callable[[], Any]) -> Any:
        """Return the next micro-batch of a data iterator: in a redo, the one it was.

        fetch: asks the iterator itself. Outside of steps that is all.
        """
        step = self._current
        if step is None:
            return fetch()
        batches, place = step.batches[iterator], self._num_taken[iterator]
        if place < len(batches):
            batch, rng = batches[place]
            restore_rng(rng)
        else:
            self._manager.phase("data")
            batch = self._fetch(step, fetch)
            batches.append((batch, capture_rng()))
        self._num_taken[iterator] += 1
        return batch

    def _fetch(self, step: _Step, fetch: Callable[[], Any]) -> Any:
        if not self._manager.has_device_proxy:
            return fetch()
        try:
            batch = fetch()
            step.copies.append(Copies(batch))
            return batch
        except RuntimeError as error:
            if not self._manager.is_device_lost:
                raise
            # Nobody knows whether the iterator would give it again.
            self._lost_batch = FatalError(
                "the device was lost while a data iterator made a batch on it; have "
                "iterators give batches in host memory, and move them in the step"
            )
            raise self._lost_batch from error

    def catch_up(self) -> None:
        """Repair the job, and make all steps again that it has gone back behind."""
        free_unwound_step()
        rng = capture_rng()
        while True:
            if self._lost_batch is not None:
                raise self._lost_batch
            self._undo()
            self._manager.recover()
            try:
                with self.commit.unwound():
                    self._fill_again()
                for step in list(self._steps):
                    if step.number >= self._manager.version:
                        restore_rng(step.rng)
                        with self.commit.unwound():
                            self._state.buffers.rewind()
                        if self._manager.begin() is Outcome.REDO:
                            raise Redo
                        self._make(step)
                break
            except Redo:
                continue
        if not self._is_in_step:
            restore_rng(rng)

    def _undo(self) -> None:
        """Have the state drop what an unwound step has left.

        On a lost device it is the recovery that does.
        """
        try:
            self._state.undo()
        except RuntimeError:
            if not self._manager.is_device_lost:
                raise

    def _fill_again(self) -> None:
        """Fill the batches that lay on a device that was lost since."""
        generation = self._manager.device_generation
        if generation != self._generation:
            for step in self._steps:
                for copies in step.copies:
                    copies.put_back()
                if step.kept_result is not None:
                    step.kept_result.put_back()
            self._generation = generation

    def _make(self, step: _Step) -> None:
        """Make the step; raises Redo with nothing left of it."""
        self._manager.mesh.absorb(False)  # a failure is an exception, at once
        self._current = step
        self._num_taken.clear()
        try:
            with self.commit.due():
                self._state.buffers.begin()
                self._state.begin()
                step.result = step.make()
            if self._manager.has_device_proxy:
                # It may be lost behind the step, which nobody makes again then.
                step.kept_result = ResultCopies(step.result)
            with self.commit.unwound():
                self._state.end()
            if self._manager.end() is Outcome.REDO:
                raise Redo
            self._state.buffers.end()
            if self._manager.meet() is Outcome.REDO:
                raise Redo
        except Redo:
            self._undo()
            raise
        finally:
            self._current = None
        horizon = self._manager.horizon
        self._steps = [step for step in self._steps if step.number >= horizon]
