"""Tells the manager which part of a step Megatron is in."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from mnemosyne_plugin.adapters.megatron.state import MegatronState, bucket_groups
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.manager import Manager

_CORE = "megatron.core."
# Functions that a step calls through the module they are in, and the phase they begin.
_FUNCTIONS = {
    (_CORE + "pipeline_parallel.schedules", "forward_step"): "forward",
    (_CORE + "pipeline_parallel.schedules", "backward_step"): "backward",
    (_CORE + "optimizer.optimizer", "get_grad_norm_fp32"): "norm",
}
_METHODS = {
    (_CORE + "pipeline_parallel.p2p_communication", "P2PCommunicator"): (
        *("_communicate", "p2p"),
    ),
}


def install(manager: Manager, state: MegatronState) -> None:
    """Wrap what begins a phase. Raises ConfigError where something is not there."""

    def enter(phase: str) -> None:
        manager.collect()
        manager.phase(phase)

    for (module_name, name), phase in _FUNCTIONS.items():
        _wrap(importlib.import_module(module_name), name, enter, phase)
    for (module_name, class_name), (name, phase) in _METHODS.items():
        owner = getattr(importlib.import_module(module_name), class_name, None)
        _wrap(owner, name, enter, phase)
    for chunk in state.chunks:
        _wrap(chunk, "finish_grad_sync", enter, "reduce")
        for group in bucket_groups(chunk):
            _wrap(group, "start_param_sync", enter, "gather")


def _wrap(owner: Any, name: str, enter: Callable[[str], None], phase: str) -> None:
    function = getattr(owner, name, None)
    if not callable(function):
        raise ConfigError(
            f"Megatron has no {getattr(owner, '__name__', owner)}.{name}; want "
            "megatron-core 0.16 to 0.19"
        )

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        enter(phase)
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)
