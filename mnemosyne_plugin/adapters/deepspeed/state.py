"""The replicated state of a DeepSpeed engine with ZeRO stage 0, fp32 or bf16."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.state.manifest import Entry
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

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALAR_TYPES = (bool, int, float, str, type(None))


class EngineState:
    """Implements TrainingState for an engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # A bf16 engine wraps the torch optimizer, which then owns fp32 copies.
        self._wrapper = engine.optimizer
        self.optimizer = torch_optimizer(engine)
        self.buffers = Buffers(engine.module)
        self.rewind = self.buffers.rewind
        self.local = self.buffers.local
        self.load_local = self.buffers.load_local

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
        scheduler = self._engine.lr_scheduler
        return {
            "counters": self._counters_at_begin(),
            "optimizer": optimizer_scalars(self.optimizer),
            "wrapper": self._wrapper_scalars(),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.undo(scalars)
        load_optimizer_scalars(self.optimizer, scalars["optimizer"])
        if self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(scalars["scheduler"])

    def mark(self) -> dict[str, Any]:
        """Return what a step changes before, or without, its mutation."""
        counters = {name: getattr(self._engine, name) for name in _COUNTERS}
        return {"counters": counters, "wrapper": self._wrapper_scalars()}

    def undo(self, mark: Mapping[str, Any]) -> None:
        """Go back to ``mark``."""
        for name, value in mark["counters"].items():
            setattr(self._engine, name, value)
        for place, owner in self._owners().items():
            vars(owner).update(mark["wrapper"][place])

    def _counters_at_begin(self) -> dict[str, int]:
        counters: dict[str, int] = self.mark()["counters"]
        # A source is in the middle of the step that the newcomer begins.
        per_step = self._engine.gradient_accumulation_steps()
        counters["micro_steps"] -= counters["micro_steps"] % per_step
        return counters

    def _wrapper_scalars(self) -> dict[str, dict[str, Any]]:
        return {place: _scalars_of(owner) for place, owner in self._owners().items()}

    def _owners(self) -> dict[str, Any]:
        """Return the objects around the torch optimizer that count or scale."""
        if self._wrapper is self.optimizer:
            return {}
        return {"wrapper": self._wrapper, "scale": self._wrapper.loss_scale_config}


def torch_optimizer(engine: Any) -> Any:
    """Return the optimizer whose ``step`` mutates the parameters."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _scalars_of(owner: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, _SCALAR_TYPES)
    }


def check_supported(engine: Any) -> None:
    """Raise ConfigError unless this kind of engine is protected by this version."""
    is_managed = engine.managed_gradient_accumulation()
    reasons = {
        "ZeRO stage 1, 2 or 3": engine.zero_optimization_stage() > 0,
        "a pipeline engine": bool(getattr(engine, "pipeline_parallelism", False)),
        "fp16": engine.fp16_enabled(),
        "a loss scaler of torch.autocast": bool(engine.torch_autocast_z0_gradscaler),
        "mixture of experts": engine.has_moe_layers,
        "managed_gradient_accumulation=false": not is_managed,
        "a model-parallel unit (mpu)": engine.mpu is not None,
        "no optimizer": engine.optimizer is None,
    }
    for reason, is_given in reasons.items():
        if is_given:
            raise ConfigError(
                f"mnemosyne cannot protect {reason} yet; protected are ZeRO stage 0 in "
                "fp32 and bf16. Set mnemosyne.enabled to false to run unprotected"
            )
    optimizer = torch_optimizer(engine)
    is_bf16 = optimizer is not engine.optimizer
    # torch marks the step functions that run its hooks; our vote is one of them.
    is_hooked = getattr(type(optimizer).step, "hooked", False)
    is_known = hasattr(engine.optimizer, "fp32_groups") if is_bf16 else True
    if not (isinstance(optimizer, torch.optim.Optimizer) and is_hooked and is_known):
        raise ConfigError(
            f"mnemosyne cannot protect the optimizer {type(engine.optimizer).__name__} "
            "yet; use one of torch.optim"
        )
