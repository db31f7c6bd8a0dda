"""The step of a DeepSpeed engine, made redoable.

``forward``, ``backward`` and ``step`` stay calls of the user's loop. What a redo needs
is kept for each micro-batch: the inputs of forward, the random state before it,
and the gradients that arrived at its outputs. So a redo runs the module and its
backward again, but nothing of the user's code.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mnemosyne_plugin.adapters.deepspeed.state import EngineState
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
    for name, want in _TARGETS.items():
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


class _Redo(BaseException):
    """Unwinds a doomed step; not an Exception, so that the engine lets it pass."""


@dataclass(slots=True)
class _MicroBatch:
    """What a redo needs of one forward and backward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    rng: RngState
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


class EngineHooks:
    """Wraps the methods of one engine instance."""

    def __init__(self, engine: Any, state: EngineState, manager: Manager) -> None:
        self._engine = engine
        self._state = state
        self._manager = manager
        self._num_collectives = -1
        self._is_foreign = False
        self._micro_batches: list[_MicroBatch] = []
        self._is_committed = False

    def install(self) -> None:
        """Put the wrappers in place."""
        engine = self._engine
        self._take_model_step = engine._take_model_step
        self._forward = engine.forward
        engine.forward = self.forward
        engine._take_model_step = self.take_model_step
        # Gradients and norms are reduced by then, and nothing is mutated yet.
        self._state.optimizer.register_step_pre_hook(self._commit)
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
        if not self._micro_batches:
            self._manager.begin()
            self._state.buffers.begin()
            self._num_collectives = -1
            self._is_foreign = False
        self._look_for_foreign_collectives()
        self._manager.phase("forward")
        micro_batch = _MicroBatch(args, kwargs, _versions(args, kwargs), capture_rng())
        self._micro_batches.append(micro_batch)
        output = self._forward(*args, **kwargs)
        micro_batch.keep_gradients(output)
        self._num_collectives = num_collectives()
        return output

    def _look_for_foreign_collectives(self) -> None:
        """Note whether the script has communicated since the engine last did."""
        if self._num_collectives not in (-1, num_collectives()):
            self._is_foreign = True

    def take_model_step(self, lr_kwargs: Any = None) -> None:
        """In place of engine._take_model_step: commits, then lets the engine mutate."""
        self._look_for_foreign_collectives()
        mark = self._state.mark()
        while True:
            self._is_committed = False
            try:
                self._take_model_step(lr_kwargs)
                if not self._is_committed:  # skipped, because a gradient overflowed
                    self._commit()
                break
            except _Redo:
                self._state.undo(mark)
                self._redo()
        self._micro_batches.clear()
        self._state.buffers.end()
        self._manager.end()

    def _commit(self, *_: Any) -> None:
        if self._manager.commit() is Outcome.REDO:
            raise _Redo
        self._is_committed = True

    def _redo(self) -> None:
        if self._is_foreign:
            raise FatalError(
                "a worker was lost in a step in which the script itself communicates "
                "(between the engine's forward, backward and step): such a step cannot "
                "be run again yet; restart from your last checkpoint"
            )
        engine = self._engine
        rng_at_step = capture_rng()
        engine.zero_grad()
        self._state.rewind()
        self._manager.mesh.absorb(True)
        first_micro_step = engine.micro_steps - len(self._micro_batches) + 1
        for number, micro_batch in enumerate(self._micro_batches):
            engine.micro_steps = first_micro_step + number
            self._run_again(micro_batch)
        restore_rng(rng_at_step)

    def _run_again(self, micro_batch: _MicroBatch) -> None:
        engine = self._engine
        args, kwargs = micro_batch.args, micro_batch.kwargs
        if _versions(args, kwargs) != micro_batch.versions:
            raise StateMismatch(
                "the inputs of forward were changed in place after it, so the step "
                "cannot be run again; give the engine a tensor of its own",
                key="inputs",
            )
        restore_rng(micro_batch.rng)
        self._manager.phase("forward")
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
            result = method(*args, **kwargs)
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
