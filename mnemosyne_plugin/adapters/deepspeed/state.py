"""The state of a DeepSpeed engine with ZeRO stage 0, and what every engine counts."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.torch_state import (
    Buffers,
    Frozen,
    Tensors,
    allocate_optimizer,
    check_manifest,
    load_optimizer_scalars,
    module_tensors,
    optimizer_scalars,
    optimizer_tensors,
)

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALAR_TYPES = (bool, int, float, str, type(None))


class EngineScalars:
    """What an engine counts, scales and schedules, as it is between two steps."""

    def __init__(self, engine: Any, owners: Mapping[str, Any]) -> None:
        """owners: objects around the torch optimizer that count or scale, by name."""
        self._engine = engine
        self._owners = owners
        self._next_micro_step: int | None = None
        self._marked: dict[str, Any] | None = None

    def note_begin(self, micro_step: int) -> None:
        """Note the number of the first micro-step of the next step to be made."""
        self._next_micro_step = micro_step

    def at_begin(self) -> dict[str, Any]:
        """Return all of it, as it is at the begin of the step. Picklable."""
        # A loss scaler counts in front of the mutation.
        values = self._marked or self._values()
        counters = dict(values["counters"])
        if self._next_micro_step is not None:
            counters["micro_steps"] = self._next_micro_step
        scheduler = self._engine.lr_scheduler
        return {
            "counters": counters,
            "owners": values["owners"],
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
        }

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Take what ``at_begin`` returned."""
        self._marked = None
        self._set(scalars)
        self._next_micro_step = scalars["counters"]["micro_steps"]
        if self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(scalars["scheduler"])

    def mark(self) -> None:
        """Note what a step changes before, or without, its mutation."""
        self._marked = self._values()

    def unmark(self) -> None:
        """The mutation is done."""
        self._marked = None

    def undo(self) -> None:
        """Go back to the mark, if there is one."""
        if self._marked is not None:
            self._set(self._marked)
        self._marked = None

    def _values(self) -> dict[str, Any]:
        return {
            "counters": {name: getattr(self._engine, name) for name in _COUNTERS},
            "owners": {name: _scalars_of(o) for name, o in self._owners.items()},
        }

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values["counters"].items():
            setattr(self._engine, name, value)
        for name, owner in self._owners.items():
            vars(owner).update(values["owners"][name])


class EngineState:
    """Implements TrainingState for an engine whose state is all replicated."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # A bf16 or fp16 engine wraps the torch optimizer, which owns fp32 copies.
        self._wrapper = engine.optimizer
        self.optimizer = torch_optimizer(engine)
        self.buffers = Buffers(engine.module)
        self.rewind = self.buffers.rewind
        self.local = self.buffers.local
        self.load_local = self.buffers.load_local
        self.engine_scalars = EngineScalars(engine, self._owners())

    def tensors(self) -> Tensors:
        tensors = module_tensors(self._engine.module)
        if self._wrapper is not self.optimizer:
            for number, group in enumerate(self.optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    tensors[f"master/{number}/{index}"] = parameter.data
        return tensors | optimizer_tensors(self.optimizer)

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        allocate_optimizer(self.optimizer, manifest)
        tensors = self.tensors()
        check_manifest(tensors, manifest)
        return {entry.key: tensors[entry.key] for entry in manifest}

    def scalars(self) -> dict[str, Any]:
        return {
            "engine": self.engine_scalars.at_begin(),
            "optimizer": optimizer_scalars(self.optimizer),
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.buffers.end()  # they are tensors of the state, and in place by now
        self.engine_scalars.load(scalars["engine"])
        load_optimizer_scalars(self.optimizer, scalars["optimizer"])

    def replicated(self) -> Frozen:
        """As a Shard: all of the state is in it."""
        return Frozen({}, self.rewind)

    def rebuild(self) -> None:
        """As a Shard: nothing follows from the state of other ranks."""
        self.reset()

    def loaded(self) -> None:
        """A checkpoint was loaded."""

    def reset(self) -> None:
        """Drop the gradients of an unwound step."""
        self._engine.zero_grad()

    def _owners(self) -> dict[str, Any]:
        if self._wrapper is self.optimizer:
            return {}
        return {"wrapper": self._wrapper, "scale": self._wrapper.loss_scale_config}


def reset_timers(engine: Any, running: Collection[str] = ()) -> None:
    """Stop the timers that an unwound step has left running; leave those named."""
    for name, timer in engine.timers.get_timers().items():
        if name not in running:
            timer.reset()


def make_repeatable(optimizer: Any) -> None:
    """Let each step of an optimizer follow from the state that we copy alone.

    DeepSpeed's Adam for the CPU multiplies the powers of its betas up from step to
    step, out of sight: a newcomer's differ in the last bit. Made anew, it computes them
    from the number of the step.
    """

    def make_anew(adam: Any, *_: Any) -> None:
        group = adam.param_groups[0]
        rates = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        adam.ds_opt_adam.create_adam(adam.opt_id, *rates, adam.adam_w_mode, False)

    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        optimizer.register_step_pre_hook(make_anew)


def torch_optimizer(engine: Any) -> Any:
    """Return the optimizer whose ``step`` mutates the parameters."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _scalars_of(owner: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, _SCALAR_TYPES)
    }
