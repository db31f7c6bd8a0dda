"""NVIDIA's kernels below Megatron: apex and Transformer Engine.

Their fused optimizers keep their state as torch's do. Quantized training keeps scales
outside of parameters, buffers and optimizer; some kernels communicate by themselves.
"""

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from mnemosyne_plugin.errors import ConfigError

_PACKAGES = {"apex": "apex", "transformer_engine": "Transformer Engine"}
_BESIDE_GROUPS = "its kernels communicate outside of process groups"
_UNSEEN = {
    "fp8": "its scales are neither parameters nor buffers",
    "fp4": "its scales are neither parameters nor buffers",
    "tp_comm_overlap": _BESIDE_GROUPS,
}


def line(optimizers: Sequence[Any]) -> str:
    """Say which of them this job has, and whose optimizer steps."""
    loaded = [
        f"{name} {_version(package)}"
        for package, name in _PACKAGES.items()
        if package in sys.modules
    ]
    steppers = sorted({_full_name(type(part.optimizer)) for part in optimizers})
    return (
        f"mnemosyne: {' and '.join(loaded) or 'no apex, no Transformer Engine'}; "
        f"steps are made by {', '.join(steppers) or 'no optimizer'}"
    )


def check(chunks: Sequence[Any]) -> None:
    """Raise ConfigError if a model has state, or peers, that we do not see."""
    for chunk in chunks:
        for option, why in _UNSEEN.items():
            if value := getattr(chunk.config, option, None):
                raise ConfigError(
                    f"mnemosyne cannot protect {option}={value} yet: {why}"
                )
        if getattr(chunk.config, "moe_token_dispatcher_type", None) == "flex":
            raise ConfigError(
                "mnemosyne cannot protect the flex token dispatcher yet: "
                f"{_BESIDE_GROUPS}; use alltoall or allgather"
            )
        for name, parameter in chunk.named_parameters():
            kind = type(parameter.data)
            if kind.__module__.partition(".")[0] in _PACKAGES:
                raise ConfigError(
                    f"mnemosyne cannot protect quantized parameters yet: {name} is a "
                    f"{kind.__name__}"
                )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(sys.modules[package], "__version__", "(version unknown)"))


def _full_name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"
