"""A step that the plugin owns as a whole, made redoable.

Pipelines and Megatron make a step in one call, its collectives included. So a failure
unwinds it as an exception, and the call is made again with the same micro-batches.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mnemosyne_plugin.adapters.redo import Commit, Redo
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


class WholeStep:
    """Makes one step after the other."""

    def __init__(self, manager: Manager, state: StepState) -> None:
        self._manager = manager
        self._state = state
        self._steps: list[_Step] = []  # those that may have to be made again
        self._is_in_step = False  # the last one is under way
        self._current: _Step | None = None
        self._num_taken: Counter[int] = Counter()
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
        try:
            result = self._make(self._steps[-1])
        except Redo:
            result = self.catch_up()
        self._is_in_step = False
        return result

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
            batch = fetch()
            batches.append((batch, capture_rng()))
        self._num_taken[iterator] += 1
        return batch

    def catch_up(self) -> Any:
        """Repair the job, and make all steps again that it has gone back behind.

        Returns what the last of them returned.
        """
        rng = capture_rng()
        while True:
            self._state.undo()
            self._manager.recover()
            try:
                result = None
                for step in list(self._steps):
                    if step.number >= self._manager.version:
                        restore_rng(step.rng)
                        self._state.buffers.rewind()
                        if self._manager.begin() is Outcome.REDO:
                            raise Redo
                        result = self._make(step)
                break
            except Redo:
                continue
        if not self._is_in_step:
            restore_rng(rng)
        return result

    def _make(self, step: _Step) -> Any:
        """Make the step; raises Redo with nothing left of it."""
        self._manager.mesh.absorb(False)  # a failure is an exception, at once
        self._state.buffers.begin()
        self._state.begin()
        self._current = step
        self._num_taken.clear()
        try:
            with self.commit.due():
                result = step.make()
            self._state.end()
            if self._manager.end() is Outcome.REDO:
                raise Redo
        except Redo:
            self._state.undo()
            raise
        finally:
            self._current = None
        self._state.buffers.end()
        horizon = self._manager.horizon
        self._steps = [step for step in self._steps if step.number >= horizon]
        return result
