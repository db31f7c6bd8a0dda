"""The step of a DeepSpeed pipeline engine, made redoable.

``train_batch`` is the whole step, the loss of all ranks included.
"""

from collections.abc import Callable
from typing import Any

from mnemosyne_plugin.adapters.deepspeed.hooks import check_methods
from mnemosyne_plugin.adapters.deepspeed.state import EngineState, reset_timers
from mnemosyne_plugin.adapters.deepspeed.zero import ZeroState
from mnemosyne_plugin.adapters.whole_step import WholeStep
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.manager import Manager

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


class PipelineHooks:
    """Wraps the methods of one pipeline engine."""

    def __init__(
        self, engine: Any, state: EngineState | ZeroState, manager: Manager
    ) -> None:
        self._engine = engine
        self._state = state
        self._manager = manager
        self._whole = WholeStep(manager, self)
        self.buffers = state.buffers
        self.catch_up = self._whole.catch_up
        self.is_in_step = False  # where the script calls anything

    def install(self) -> None:
        """Put the wrappers in place."""
        engine = self._engine
        self._train_batch = engine.train_batch
        self._next_batch = engine._next_batch
        engine.train_batch = self.train_batch
        engine._next_batch = lambda: self._whole.take(0, self._next_batch)
        self._state.optimizer.register_step_pre_hook(self._whole.commit)
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
        return self._whole.run(self._train_batch)

    # --- StepState ------------------------------------------------------------------

    def begin(self) -> None:
        scalars = self._state.engine_scalars
        scalars.note_begin(self._engine.micro_steps)
        scalars.mark()

    def end(self) -> None:
        scalars = self._state.engine_scalars
        scalars.unmark()
        scalars.note_begin(self._engine.micro_steps)

    def undo(self) -> None:
        """Drop all that an unwound step has left in the engine.

        A newcomer tells its neighbours the shapes that it sends: all have to again.
        """
        self._state.engine_scalars.undo()
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
