"""Plain torch DDP: the smallest complete adapter, and the template for others.

    session = mnemosyne_plugin.attach(model=ddp, optimizer=optimizer)
    for step in range(session.step, num_steps):
        loss = session.run(train_step, *batch(step))

``train_step`` does everything of one step: zero_grad, forward, backward, clipping and
one ``optimizer.step()``. If a worker is lost in it, it is run again on repaired groups.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mnemosyne_plugin import recovery
from mnemosyne_plugin.adapters.lost_device import Copies, Results, tell
from mnemosyne_plugin.adapters.redo import free_unwound_step
from mnemosyne_plugin.data import positions
from mnemosyne_plugin.errors import ConfigError, FatalError
from mnemosyne_plugin.recovery.commit import Outcome
from mnemosyne_plugin.recovery.manager import Manager
from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.rng import capture_rng, restore_rng
from mnemosyne_plugin.state.torch_state import (
    Buffers,
    Tensors,
    allocate_optimizer,
    check_manifest,
    load_optimizer_scalars,
    module_tensors,
    optimizer_scalars,
    optimizer_tensors,
)


class _Redo(BaseException):
    """Unwinds a doomed step; not an Exception, so that user code lets it pass."""


class _Made(BaseException):
    """Unwinds an optimizer's step that the others have made, and this rank has."""


class _FixedBuckets:
    """A DDP reducer that keeps the buckets it began with.

    DDP lays its buckets out anew after a process's first step, in the order in which
    gradients became ready. A newcomer makes its first step when the others have long
    done so, and reductions fit only between equal buckets.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


class _DdpState:
    """The replicated state: model, optimizer, scheduler."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self.buffers = Buffers(model)
        self.rewind = self.buffers.rewind
        self.local = self.buffers.local
        self.load_local = self.buffers.load_local

    def tensors(self) -> Tensors:
        return module_tensors(self._model) | optimizer_tensors(self._optimizer)

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        allocate_optimizer(self._optimizer, manifest)
        tensors = self.tensors()
        check_manifest(tensors, manifest)
        return {entry.key: tensors[entry.key] for entry in manifest}

    def scalars(self) -> dict[str, Any]:
        scheduler = self._scheduler.state_dict() if self._scheduler else None
        return {"optimizer": optimizer_scalars(self._optimizer), "scheduler": scheduler}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        load_optimizer_scalars(self._optimizer, scalars["optimizer"])
        if self._scheduler:
            self._scheduler.load_state_dict(scalars["scheduler"])


class Session:
    """Runs steps of a protected training loop. Made by ``attach``."""

    def __init__(
        self,
        manager: Manager,
        buffers: Buffers,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
    ) -> None:
        self._manager = manager
        self._buffers = buffers
        self._has_voted = False
        self._reducer = getattr(model, "reducer", None)
        self._results = Results() if manager.has_device_proxy else None
        optimizer.register_step_pre_hook(self._before_mutation)
        if self._results is not None:
            optimizer.step = self._see_through(optimizer.step)  # type: ignore[method-assign]

    @property
    def step(self) -> int:
        """Number of the next step; not 0 where this worker replaces a lost one."""
        return self._manager.version

    def run(self, train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one step and return what ``train_step`` returned.

        ``train_step(*args, **kwargs)`` may be called more than once: each time with the
        same random state and buffers, and only the last one mutates parameters.
        """
        self._manager.phase("data")
        inputs, generation = self._inputs(args, kwargs), self._manager.device_generation
        if self._manager.begin() is Outcome.REDO:
            raise FatalError(
                f"a device was lost with the only copy of step {self._manager.version} "
                "made; restart from your last checkpoint"
            )
        is_again = self._manager.device_generation != generation
        rng = capture_rng()

        def attempt() -> Any:
            self._buffers.rewind()
            self._buffers.begin()
            if is_again and inputs is not None:
                inputs.put_back()
            self._manager.phase("forward")
            return train_step(*args, **kwargs)

        while True:
            self._has_voted = False
            try:
                result = self._run(attempt)
            except _Redo:
                free_unwound_step()
                restore_rng(rng)
                is_again = True
                continue
            if not self._has_voted:
                raise FatalError("train_step must call optimizer.step() exactly once")
            self._buffers.end()
            self._manager.end()
            return result

    def _inputs(self, *arguments: Any) -> Copies | None:
        if self._results is None:
            return None
        try:
            return Copies(*arguments)
        except RuntimeError as error:
            if not self._manager.is_device_lost:
                raise
            raise FatalError(
                "the device was lost between two steps, and the next batch with it; "
                "give session.run batches in host memory, and move them in train_step"
            ) from error

    def _run(self, attempt: Callable[[], Any]) -> Any:
        if self._results is None:
            return attempt()
        self._results.begin()
        try:
            return attempt()
        except FatalError:
            raise
        except Exception:
            # A lost device, or another rank's, is an exception anywhere in a step.
            if self._has_voted or not self._manager.is_doomed:
                raise
            self._manager.recover()
            if self._reducer is not None:
                self._reducer._reset_state()
            raise _Redo from None

    def _before_mutation(self, *_: Any) -> None:
        if self._has_voted:
            raise FatalError("train_step must call optimizer.step() exactly once")
        if self._results is not None:
            # Before the vote: behind it a device that is lost here leaves no loss. The
            # script may have computed one on a stream of its own.
            self._manager.wait_for_device()
            self._results.keep(Session._run.__code__)
        if self._manager.commit() is Outcome.REDO:
            raise _Redo
        self._has_voted = True
        if self._manager.is_ahead:
            raise _Made

    def _see_through(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Make a mutation in which the device is lost look as if it had not been."""

        @functools.wraps(step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result, generation = None, self._manager.device_generation
            try:
                result = step(*args, **kwargs)
            except _Made:
                pass
            except Exception:
                if not (self._has_voted and self._manager.is_device_lost):
                    raise
            if not self._manager.is_ahead and self._manager.mutated() is Outcome.REDO:
                raise _Redo
            assert self._results is not None
            if self._manager.device_generation != generation:
                self._results.put_back()
            return result

        return wrapper


def attach(
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
) -> Session:
    """Protect a training loop: call it on every rank, right before the loop.

    model: the DistributedDataParallel module; its state must be equal on all ranks.
    scheduler: anything with ``state_dict`` and ``load_state_dict``.

    Raises ConfigError if this process was not started by `mnemosyne run`.
    """
    manager = recovery.current()
    if manager is None:
        raise ConfigError(
            "attach() protects workers that `mnemosyne run` started; start this "
            "script by `mnemosyne run` in place of torchrun"
        )
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.reducer = _FixedBuckets(model.reducer)  # type: ignore[assignment]
    state = _DdpState(model, optimizer, scheduler)
    manager.attach(state, positions())
    if manager.is_speaker:
        tell(manager)
    return Session(manager, state.buffers, optimizer, model)
