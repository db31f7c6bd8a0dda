"""The step of a DeepSpeed engine, made redoable.

``forward``, ``backward`` and ``step`` stay calls of the user's loop. What a redo needs
is kept for each micro-batch: the inputs of forward, the random state before it,
and the gradients that arrived at its outputs. So a redo runs the module and its
backward again, but nothing of the user's code. Where the job goes back (ZeRO), the last
finished step is made again in the same way.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mnemosyne_plugin.adapters.deepspeed.state import EngineState, reset_timers
from mnemosyne_plugin.adapters.deepspeed.zero import ZeroState
from mnemosyne_plugin.adapters.redo import Commit, Redo
from mnemosyne_plugin.ccl.intercept import num_collectives
from mnemosyne_plugin.errors import ConfigError, FatalError, StateMismatch
from mnemosyne_plugin.recovery.commit import Outcome
from mnemosyne_plugin.recovery.manager import Manager
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng

# Name of each engine method that is wrapped or called, and its parameters.
_TARGETS = {
    "forward": ("inputs", "kwargs"),
    "backward": ("loss", "retain_graph", "scale_wrt_gas"),
    "allreduce_gradients": ("bucket_size",),
    "_take_model_step": ("lr_kwargs",),
    "_backward_prologue": (),
    "_backward_epilogue": (),
    "zero_grad": (),
}


def check_targets(engine: Any) -> None:
    """Raise ConfigError unless the engine has the methods that we hook."""
    check_methods(engine, _TARGETS)


def check_methods(engine: Any, targets: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ConfigError unless the engine has these methods with these parameters."""
    for name, want in targets.items():
        method = getattr(type(engine), name, None)
        if method is None:
            raise ConfigError(
                f"DeepSpeed engine has no {name}(); want 0.19.8 to 0.19.x"
            )
        got = tuple(inspect.signature(method).parameters)
        # A method under DeepSpeed's profiling decorator hides its parameters.
        if got not in (("self", *want), ("args", "kwargs")):
            raise ConfigError(
                f"DeepSpeed engine.{name} takes {got}, this version expects {want}; "
                "want DeepSpeed 0.19.8 to 0.19.x"
            )


@dataclass(slots=True)
class _MicroBatch:
    """What a redo needs of one forward and backward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    rng: RngState
    micro_step: int
    num_outputs: int = 0
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)

    def keep_gradients(self, output: Any) -> None:
        """Note the gradient that will arrive at each tensor of ``output``."""
        tensors = _differentiable(output)
        self.num_outputs = len(tensors)
        for place, tensor in enumerate(tensors):
            tensor.register_hook(self._keeper(place))  # type: ignore[no-untyped-call]

    def _keeper(self, place: int) -> Callable[[torch.Tensor], None]:
        def keep(gradient: torch.Tensor) -> None:
            self.gradients[place] = gradient

        return keep


@dataclass(slots=True)
class _Step:
    """What a redo needs of one step, whole or under way."""

    number: int
    rng: RngState
    micro_batches: list[_MicroBatch] = field(default_factory=list)
    rng_at_step: RngState | None = None
    """The random state at ``engine.step()``; None while the step is under way."""
    lr_kwargs: Any = None
    is_foreign: bool = False
    """The script itself has communicated in it."""


class EngineHooks:
    """Wraps the methods of one engine instance."""

    def __init__(
        self, engine: Any, state: EngineState | ZeroState, manager: Manager
    ) -> None:
        self._engine = engine
        self._state = state
        self._manager = manager
        self._num_collectives = -1
        self._steps: list[_Step] = []  # those that may have to be made again
        self._is_in_step = False  # the last one is under way
        self._commit = Commit(manager)

    def install(self) -> None:
        """Put the wrappers in place."""
        engine = self._engine
        self._take_model_step = engine._take_model_step
        self._forward = engine.forward
        engine.forward = self.forward
        engine._take_model_step = self.take_model_step
        # Gradients and norms are reduced by then, and nothing is mutated yet.
        self._state.optimizer.register_step_pre_hook(self._commit)
        if isinstance(self._state, ZeroState):
            self._state.stage.before_gather(lambda: self._manager.phase("gather"))
        engine.backward = self._with_phase("backward", engine.backward)
        engine.allreduce_gradients = self._with_phase(
            "reduce",
            engine.allreduce_gradients,
            only_if=engine.is_gradient_accumulation_boundary,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of engine.forward: begins the step, and notes what a redo needs."""
        if not (self._engine.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        if not self._is_in_step:
            self._begin()
        self._manager.collect()
        self._look_for_foreign_collectives()
        micro_batch = _MicroBatch(
            args,
            kwargs,
            _versions(args, kwargs),
            capture_rng(),
            self._engine.micro_steps,
        )
        self._steps[-1].micro_batches.append(micro_batch)
        while True:
            self._manager.phase("forward")
            try:
                with self._commit.unwound():
                    output = self._forward(*args, **kwargs)
                if not self._manager.has_failed:
                    break
            except Redo:
                pass
            # What it has returned may be made of what never came: parameters (ZeRO 3),
            # tokens of other ranks (experts, Ulysses), statistics (synchronised norms).
            self.catch_up()
            restore_rng(micro_batch.rng)
        micro_batch.keep_gradients(output)
        self._num_collectives = num_collectives()
        return output

    def _begin(self) -> None:
        while self._manager.begin() is Outcome.REDO:
            self.catch_up()
        self._state.buffers.begin()
        self._state.engine_scalars.note_begin(self._engine.micro_steps)
        self._num_collectives = -1
        self._steps.append(_Step(self._manager.version, capture_rng()))
        self._is_in_step = True

    def _look_for_foreign_collectives(self) -> None:
        """Note whether the script has communicated since the engine last did."""
        if self._num_collectives not in (-1, num_collectives()):
            self._steps[-1].is_foreign = True

    def take_model_step(self, lr_kwargs: Any = None) -> None:
        """In place of engine._take_model_step: commits, then lets the engine mutate."""
        self._look_for_foreign_collectives()
        step = self._steps[-1]
        step.rng_at_step, step.lr_kwargs = capture_rng(), lr_kwargs
        try:
            self._finish(step)
        except Redo:
            self.catch_up()
        self._is_in_step = False

    def _finish(self, step: _Step) -> None:
        """Mutate, from reduced gradients; raises Redo with nothing left of it."""
        scalars = self._state.engine_scalars
        scalars.mark()
        try:
            with self._commit.due():
                self._take_model_step(step.lr_kwargs)
            scalars.unmark()
            scalars.note_begin(self._engine.micro_steps + 1)
            if self._manager.end() is Outcome.REDO:
                raise Redo
        except Redo:
            scalars.undo()
            self._state.reset()
            raise
        self._state.buffers.end()
        horizon = self._manager.horizon
        self._steps = [step for step in self._steps if step.number >= horizon]

    @property
    def is_in_step(self) -> bool:
        """Whether a step is under way."""
        return self._is_in_step

    def catch_up(self) -> None:
        """Repair the job, and make all steps again that it has gone back behind.

        The step under way is made again as far as it had come.
        """
        rng, micro_steps = capture_rng(), self._engine.micro_steps
        step_timers = self._engine.engine_timers.step_timers  # of engine.step() itself
        while True:
            reset_timers(self._engine, step_timers)
            self._state.reset()
            self._manager.recover()
            try:
                for step in list(self._steps):
                    if step.number >= self._manager.version:
                        self._make_again(step)
                break
            except Redo:
                continue
        self._engine.micro_steps = micro_steps
        restore_rng(rng)

    def _make_again(self, step: _Step) -> None:
        if step.is_foreign:
            raise FatalError(
                "a worker was lost in a step in which the script itself communicates "
                "(between the engine's forward, backward and step): such a step cannot "
                "be run again yet; restart from your last checkpoint"
            )
        restore_rng(step.rng)
        self._state.rewind()
        if self._manager.begin() is Outcome.REDO:
            raise Redo
        self._state.buffers.begin()
        self._state.engine_scalars.note_begin(step.micro_batches[0].micro_step)
        for micro_batch in step.micro_batches:
            with self._commit.unwound():
                self._run_again(micro_batch)
        if step.rng_at_step is not None:
            restore_rng(step.rng_at_step)
            self._finish(step)

    def _run_again(self, micro_batch: _MicroBatch) -> None:
        engine = self._engine
        args, kwargs = micro_batch.args, micro_batch.kwargs
        if not micro_batch.gradients:  # no backward has followed, at least not yet
            return
        if _versions(args, kwargs) != micro_batch.versions:
            raise StateMismatch(
                "the inputs of forward were changed in place after it, so the step "
                "cannot be run again; give the engine a tensor of its own",
                key="inputs",
            )
        restore_rng(micro_batch.rng)
        engine.micro_steps = micro_batch.micro_step
        self._manager.phase("forward")
        if engine.zero_optimization():
            engine.optimizer.clear_backward_seen_flag()
        with _autocast(engine):
            outputs = _differentiable(engine.module(*args, **kwargs))
        self._manager.phase("backward")
        if len(outputs) != micro_batch.num_outputs:
            raise StateMismatch("forward returned another number of outputs")
        with _engine_backward(engine):
            engine._backward_prologue()
            places = sorted(micro_batch.gradients)
            torch.autograd.backward(
                [outputs[place] for place in places],
                [micro_batch.gradients[place] for place in places],
            )
            engine._backward_epilogue()
        self._manager.collect()

    def _with_phase(
        self,
        phase: str,
        method: Callable[..., Any],
        only_if: Callable[[], bool] = lambda: True,
    ) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if only_if():
                self._manager.phase(phase)
            if phase == "backward":
                self._look_for_foreign_collectives()
            try:
                result = method(*args, **kwargs)
            except Exception:
                is_noted = self._is_in_step and all(
                    micro_batch.gradients
                    for micro_batch in self._steps[-1].micro_batches
                )
                if phase != "backward" or not (self._manager.has_failed and is_noted):
                    raise
                result = args[0]  # the step is doomed, and will be made again
            self._num_collectives = num_collectives()
            return result

        return wrapper


@contextmanager
def _engine_backward(engine: Any) -> Iterator[None]:
    """Tell the engine that it is in a backward of its own, as engine.backward does."""
    engine._running_engine_backward = True
    try:
        yield
    finally:
        engine._running_engine_backward = False


def _autocast(engine: Any) -> Any:
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    return autocast_if_enabled(engine)


def _differentiable(output: Any) -> list[torch.Tensor]:
    """Return the tensors in a nested output that backward can start from, in order."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]


def _versions(*inputs: Any) -> list[int]:
    leaves = pytree.tree_leaves(inputs)
    return [t._version for t in leaves if isinstance(t, torch.Tensor)]
