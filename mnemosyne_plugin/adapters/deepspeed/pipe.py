"""The step of a DeepSpeed pipeline engine, made redoable.

``train_batch`` is the whole step, the loss of all ranks included, so a failure unwinds
it as an exception. What a redo needs are the micro-batches that it has loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mnemosyne_plugin.adapters.deepspeed.hooks import check_methods
from mnemosyne_plugin.adapters.deepspeed.redo import Commit, Redo
from mnemosyne_plugin.adapters.deepspeed.state import EngineState, reset_timers
from mnemosyne_plugin.adapters.deepspeed.zero import ZeroState
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.commit import Outcome
from mnemosyne_plugin.recovery.manager import Manager
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng

_TARGETS = {
    "train_batch": ("data_iter",),
    "_next_batch": (),
    "_take_model_step": ("lr_kwargs",),
    "reset_activation_shape": (),
    "set_dataiterator": ("iterator",),
}
# The phase that an instruction of the schedule begins.
_PHASES = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "ReduceGrads": "reduce",
}


def check_targets(engine: Any) -> None:
    """Raise ConfigError unless the engine has the methods that we hook."""
    check_methods(engine, _TARGETS)
    names = {instruction.__name__ for instruction in engine._INSTRUCTION_MAP}
    if not names >= _PHASES.keys():
        raise ConfigError(
            f"DeepSpeed's pipeline schedule lacks {sorted(_PHASES.keys() - names)}; "
            "want DeepSpeed 0.19.8 to 0.19.x"
        )


@dataclass(slots=True)
class _Step:
    """What a redo needs of one ``train_batch``."""

    number: int
    rng: RngState
    batches: list[tuple[Any, RngState]] = field(default_factory=list)
    """What the data iterator gave, and the random state behind it."""


class PipelineHooks:
    """Wraps the methods of one pipeline engine."""

    def __init__(
        self, engine: Any, state: EngineState | ZeroState, manager: Manager
    ) -> None:
        self._engine = engine
        self._state = state
        self._manager = manager
        self._steps: list[_Step] = []  # those that may have to be made again
        self._is_in_step = False  # the last one is under way
        self._current: _Step | None = None
        self._num_replayed = 0
        self._commit = Commit(manager)

    def install(self) -> None:
        """Put the wrappers in place."""
        engine = self._engine
        self._train_batch = engine.train_batch
        self._next_batch = engine._next_batch
        engine.train_batch = self.train_batch
        engine._next_batch = self.next_batch
        self._state.optimizer.register_step_pre_hook(self._commit)
        if isinstance(self._state, ZeroState):
            self._state.stage.before_gather(lambda: self._manager.phase("gather"))
        engine._INSTRUCTION_MAP = {
            instruction: self._with_phase(_PHASES.get(instruction.__name__), method)
            for instruction, method in engine._INSTRUCTION_MAP.items()
        }

    def train_batch(self, data_iter: Any = None) -> Any:
        """In place of engine.train_batch."""
        if data_iter is not None:
            self._engine.set_dataiterator(data_iter)
        while self._manager.begin() is Outcome.REDO:
            self.catch_up()
        self._steps.append(_Step(self._manager.version, capture_rng()))
        self._is_in_step = True
        try:
            loss = self._run(self._steps[-1])
        except Redo:
            loss = self.catch_up()
        self._is_in_step = False
        return loss

    def next_batch(self) -> Any:
        """In place of engine._next_batch: the batches of a redo are those it had."""
        step = self._current
        if step is None:  # evaluation
            return self._next_batch()
        if self._num_replayed < len(step.batches):
            batch, rng = step.batches[self._num_replayed]
            restore_rng(rng)
        else:
            self._manager.phase("data")
            batch = self._next_batch()
            step.batches.append((batch, capture_rng()))
        self._num_replayed += 1
        return batch

    def catch_up(self) -> Any:
        """Repair the job, and make all steps again that it has gone back behind.

        Returns the loss of the last one.
        """
        rng = capture_rng()
        while True:
            self._reset()
            self._manager.recover()
            try:
                loss = None
                for step in list(self._steps):
                    if step.number >= self._manager.version:
                        restore_rng(step.rng)
                        self._state.rewind()
                        if self._manager.begin() is Outcome.REDO:
                            raise Redo
                        loss = self._run(step)
                break
            except Redo:
                continue
        if not self._is_in_step:
            restore_rng(rng)
        return loss

    def _run(self, step: _Step) -> Any:
        """Make the step; raises Redo with nothing left of it."""
        self._manager.mesh.absorb(False)  # a failure is an exception, at once
        self._state.buffers.begin()
        scalars = self._state.engine_scalars
        scalars.note_begin(self._engine.micro_steps)
        scalars.mark()
        self._current, self._num_replayed = step, 0
        try:
            with self._commit.due():
                loss = self._train_batch()
            scalars.unmark()
            scalars.note_begin(self._engine.micro_steps)
            if self._manager.end() is Outcome.REDO:
                raise Redo
        except Redo:
            scalars.undo()
            self._reset()
            raise
        finally:
            self._current = None
        self._state.buffers.end()
        horizon = self._manager.horizon
        self._steps = [step for step in self._steps if step.number >= horizon]
        return loss

    def _reset(self) -> None:
        """Drop all that an unwound step has left in the engine.

        A newcomer tells its neighbours the shapes that it sends: all have to again.
        """
        engine = self._engine
        engine.reset_activation_shape()
        engine.first_gradient_send = True
        for buffers in engine.pipe_buffers.values():
            buffers[:] = [None] * len(buffers)
        engine._force_grad_boundary = False
        reset_timers(engine)
        self._state.reset()

    def _with_phase(
        self, phase: str | None, method: Callable[..., Any]
    ) -> Callable[..., Any]:
        if phase is None:
            return method

        def wrapper(engine: Any, **kwargs: Any) -> None:
            self._manager.collect()
            self._manager.phase(phase)
            method(engine, **kwargs)

        return wrapper
