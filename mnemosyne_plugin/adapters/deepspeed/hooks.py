"""The step of a DeepSpeed engine, made redoable.

``forward``, ``backward`` and ``step`` stay calls of the user's loop. What a redo needs
is kept for each micro-batch: the inputs of forward, the random state before it,
and the gradients that arrived at its outputs. So a redo runs the module and its
backward again, but nothing of the user's code. Where the job goes back (ZeRO), the last
finished step is made again in the same way.

A lost device takes all of that along. So under the device proxy there are copies of it
in host memory, and forward and backward return when the device has done them: then
nothing of theirs can be lost in the script's own work.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mnemosyne_plugin.adapters.deepspeed.state import EngineState, reset_timers
from mnemosyne_plugin.adapters.deepspeed.zero import ZeroState
from mnemosyne_plugin.adapters.lost_device import Copies, ResultCopies
from mnemosyne_plugin.adapters.redo import Commit, Made, Redo, free_unwound_step
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
    inputs: Copies | None = None
    """Of ``args`` and ``kwargs``, where the device may be lost."""
    outputs: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    """Those that backward can start from."""
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    loss: tuple[int, bool] | None = None
    """Which output backward was called on, and whether it is divided there.

    What it gets needs no copy: it follows from that. Only where the device may be lost.
    """
    kept: list[Copies | ResultCopies] = field(default_factory=list)

    def keep_gradients(self, output: Any) -> None:
        """Note the gradient that will arrive at each tensor of ``output``."""
        for place, tensor in enumerate(_differentiable(output)):
            self.outputs.append(weakref.ref(tensor))
            tensor.register_hook(self._keeper(place))  # type: ignore[no-untyped-call]

    def _keeper(self, place: int) -> Callable[[torch.Tensor], None]:
        def keep(gradient: torch.Tensor) -> None:
            if self.loss is not None:
                return
            if self.inputs is not None:
                # At once: nothing else can compute it again.
                self.kept.append(Copies(gradient))
            self.gradients[place] = gradient

        return keep

    @property
    def has_backward(self) -> bool:
        """Whether backward was called, and is known well enough to be run again."""
        return self.loss is not None or bool(self.gradients)

    def put_back(self) -> None:
        """Fill again what a lost device took."""
        if self.inputs is not None:
            self.inputs.put_back()
        for copies in self.kept:
            copies.put_back()


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
        self._generation = manager.device_generation  # that holds what we keep
        self._inputs: Copies | None = None  # of the forward under way

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
        self._backward = engine.backward
        engine.backward = self.backward
        self._stop_timer = engine.tput_timer.stop
        engine.tput_timer.stop = self._stop_timer_unless_lost
        engine.allreduce_gradients = self._with_phase(
            "reduce",
            engine.allreduce_gradients,
            only_if=engine.is_gradient_accumulation_boundary,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of engine.forward: begins the step, and notes what a redo needs."""
        if not (self._engine.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        self._inputs = self._copies_of(args, kwargs)
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
            self._inputs,
        )
        self._steps[-1].micro_batches.append(micro_batch)
        while True:
            self._manager.phase("forward")
            try:
                with self._commit.unwound():
                    output = self._forward(*args, **kwargs)
                    self._manager.wait_for_device()
                    self._manager.collect()  # the snapshot's copy is made by now
                    if not self._manager.has_failed:
                        self._keep_results(micro_batch, output)
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

    def _copies_of(self, *arguments: Any) -> Copies | None:
        if not self._manager.has_device_proxy:
            return None
        try:
            return Copies(pytree.tree_leaves(arguments))
        except RuntimeError as error:
            if not self._manager.is_device_lost:
                raise
            raise FatalError(
                "the device was lost outside of the engine's calls, and the next batch "
                "with it; give the engine batches in host memory, and move them in the "
                "module's forward"
            ) from error

    def _keep_results(self, micro_batch: _MicroBatch, *results: Any) -> None:
        if self._manager.has_device_proxy:
            micro_batch.kept.append(ResultCopies(pytree.tree_leaves(results)))

    def _begin(self) -> None:
        while True:
            while self._manager.begin() is Outcome.REDO:
                self.catch_up()
            try:
                with self._commit.unwound():
                    self._fill_again()
                    self._state.buffers.begin()
                break
            except Redo:
                self.catch_up()
        self._state.engine_scalars.note_begin(self._engine.micro_steps)
        self._num_collectives = -1
        self._steps.append(_Step(self._manager.version, capture_rng()))
        self._is_in_step = True

    def _fill_again(self) -> None:
        """Fill what we keep on a device that was lost since."""
        generation = self._manager.device_generation
        if generation == self._generation:
            return
        self._state.reset()  # what it sets to zero is NaN now
        if self._inputs is not None:
            self._inputs.put_back()
        for step in self._steps:
            for micro_batch in step.micro_batches:
                micro_batch.put_back()
        self._generation = generation

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of engine.backward."""
        self._manager.phase("backward")
        if not self._is_in_step:
            return self._backward(loss, *args, **kwargs)
        self._look_for_foreign_collectives()
        self._manager.collect()
        micro_batches = self._steps[-1].micro_batches
        try:
            self._note_loss(micro_batches[-1], loss, *args, **kwargs)
            result = self._backward(loss, *args, **kwargs)
            self._manager.wait_for_device()
            if not self._manager.has_failed:
                self._keep_results(micro_batches[-1], result)
        except Exception as error:
            if not self._manager.has_failed:
                raise
            if not all(micro_batch.has_backward for micro_batch in micro_batches):
                if not self._manager.is_device_lost:
                    raise
                raise FatalError(
                    "the device was lost where the script computes the loss, outside "
                    "of the engine's calls, so nothing tells its gradient any more; "
                    "compute the loss in the module's forward"
                ) from error
            result = loss  # the step is doomed, and will be made again
        if self._manager.has_device_proxy and self._manager.is_doomed:
            self.catch_up()  # at once: the script may use the device next
        self._num_collectives = num_collectives()
        return result

    def _note_loss(
        self,
        micro_batch: _MicroBatch,
        loss: Any,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
    ) -> None:
        """Where the device may be lost: note what backward is called on."""
        if not self._manager.has_device_proxy:
            return
        for place, output in enumerate(micro_batch.outputs):
            if output() is loss:
                micro_batch.loss = place, scale_wrt_gas
                return
        self._keep_results(micro_batch, loss)

    def _stop_timer_unless_lost(self, *args: Any, **kwargs: Any) -> None:
        """In place of engine.tput_timer.stop, which waits for the device."""
        try:
            self._stop_timer(*args, **kwargs)
        except RuntimeError:
            if not self._manager.is_device_lost:
                raise

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
        micro_steps = self._engine.micro_steps
        scalars.mark()
        try:
            self._mutate(step)
            if self._manager.is_ahead:
                self._take_over()
                self._engine.micro_steps = micro_steps  # engine.step() is not over
            scalars.unmark()
            scalars.note_begin(micro_steps + 1)
            if self._manager.end() is Outcome.REDO:
                raise Redo
        except Redo:
            scalars.undo()
            self._engine.micro_steps = micro_steps  # a recovery took another rank's
            self._reset()
            raise
        self._state.buffers.end()
        horizon = self._manager.horizon
        if self._manager.has_device_proxy:
            # A lost device may take the only copy of what this rank has just made.
            horizon = min(horizon, step.number)
        self._steps = [step for step in self._steps if step.number >= horizon]

    def _mutate(self, step: _Step) -> None:
        """Commit and mutate. Behind it the manager is ahead, where others did it."""
        is_sharded = isinstance(self._state, ZeroState)
        try:
            with self._commit.due():
                self._take_model_step(step.lr_kwargs)
        except Made:
            return
        except Redo:
            if is_sharded or not (
                self._commit.is_done and self._manager.is_device_lost
            ):
                raise
        if is_sharded or not self._manager.has_device_proxy:
            return
        if self._manager.mutated() is Outcome.REDO:
            raise Redo

    def _take_over(self) -> None:
        """Be behind the step that the others have made, with the state they gave."""
        self._manager.take_over()
        with self._commit.unwound():
            self._fill_again()
            self._state.reset()

    def _reset(self) -> None:
        """Drop what an unwound step has left; on a lost device that may fail."""
        with suppress(Redo), self._commit.unwound():
            self._state.reset()

    @property
    def is_in_step(self) -> bool:
        """Whether a step is under way."""
        return self._is_in_step

    def catch_up(self) -> None:
        """Repair the job, and make all steps again that it has gone back behind.

        The step under way is made again as far as it had come.
        """
        free_unwound_step()
        rng, micro_steps = capture_rng(), self._engine.micro_steps
        step_timers = self._engine.engine_timers.step_timers  # of engine.step() itself
        while True:
            reset_timers(self._engine, step_timers)
            self._reset()
            self._manager.recover()
            try:
                with self._commit.unwound():
                    self._fill_again()
                    for step in list(self._steps):
                        if step.number >= self._manager.version:
                            self._make_again(step)
                    self._manager.wait_for_device()
                if not (self._manager.has_device_proxy and self._manager.is_doomed):
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
        if not micro_batch.has_backward:  # none has followed, at least not yet
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
        if len(outputs) != len(micro_batch.outputs):
            raise StateMismatch("forward returned another number of outputs")
        with _engine_backward(engine):
            engine._backward_prologue()
            if micro_batch.loss is not None:
                place, is_divided = micro_batch.loss
                torch.autograd.backward(_scaled(engine, outputs[place], is_divided))
            else:
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
            result = method(*args, **kwargs)
            self._num_collectives = num_collectives()
            return result

        return wrapper


def _scaled(engine: Any, loss: torch.Tensor, is_divided: bool) -> torch.Tensor:
    """Return what engine.backward makes of a loss before it calls backward on it."""
    if is_divided:
        loss = loss / engine.gradient_accumulation_steps()
    scale = getattr(engine.optimizer, "scale_if_loss", None)
    return loss if scale is None else scale(loss)


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
