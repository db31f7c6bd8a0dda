"""The replicated state of a DeepSpeed engine with ZeRO stage 0, fp32 or bf16."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.torch_state import (
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
        self._optimizer = getattr(self._wrapper, "optimizer", self._wrapper)

    def tensors(self) -> Tensors:
        tensors = module_tensors(self._engine.module)
        if self._wrapper is not self._optimizer:
            for number, group in enumerate(self._optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    tensors[f"master/{number}/{index}"] = parameter.data
        return tensors | optimizer_tensors(self._optimizer)

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        allocate_optimizer(self._optimizer, manifest)
        tensors = self.tensors()
        check_manifest(tensors, manifest)
        return {entry.key: tensors[entry.key] for entry in manifest}

    def scalars(self) -> dict[str, Any]:
        scheduler = self._engine.lr_scheduler
        return {
            "counters": self._counters(),
            "optimizer": optimizer_scalars(self._optimizer),
            "wrapper": {
                place: _scalars_of(owner) for place, owner in self._owners().items()
            },
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars["counters"].items():
            setattr(self._engine, name, value)
        load_optimizer_scalars(self._optimizer, scalars["optimizer"])
        for place, owner in self._owners().items():
            vars(owner).update(scalars["wrapper"][place])
        if self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(scalars["scheduler"])

    def _counters(self) -> dict[str, int]:
        counters = {name: getattr(self._engine, name) for name in _COUNTERS}
        # A source is in the middle of the step that the newcomer begins.
        per_step = self._engine.gradient_accumulation_steps()
        counters["micro_steps"] -= counters["micro_steps"] % per_step
        return counters

    def _owners(self) -> dict[str, Any]:
        """Return the objects around the torch optimizer that count or scale."""
        if self._wrapper is self._optimizer:
            return {}
        return {"wrapper": self._wrapper, "scale": self._wrapper.loss_scale_config}


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
    wrapper = engine.optimizer
    is_plain = isinstance(wrapper, torch.optim.Optimizer)
    if not is_plain and not hasattr(wrapper, "fp32_groups"):
        raise ConfigError(
            f"mnemosyne cannot protect the optimizer {type(wrapper).__name__} yet"
        )
