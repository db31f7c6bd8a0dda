"""Tensors on a device that Megatron makes once, and that are no training state.

A factor of one, the frequencies of a rotary embedding: attributes of modules and of
optimizers, which a newcomer makes for itself. A rank whose device is lost does not.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch

from mnemosyne_plugin.adapters.lost_device import Copies

# Functions there may remember tensors by their arguments; in some versions they do.
_REMEMBERING = (
    "megatron.core.transformer.utils",
    "megatron.core.fusions.fused_softmax",
)


class Constants:
    """What they are between two steps, with copies in host memory."""

    def __init__(self, model: torch.nn.Module, owners: Iterable[Any]) -> None:
        """owners: other objects that have such attributes."""
        self._owners = [*model.modules(), *owners]
        self._functions = [type(module).forward for module in model.modules()]
        self._kept: list[tuple[Any, str, _Kept | None]] = []
        self.keep()

    def keep(self) -> None:
        """Copy those that are new, or have changed. Called behind each step."""
        before = {(id(owner), name): kept for owner, name, kept in self._kept}
        now: list[tuple[Any, str, _Kept | None]] = []
        for owner in self._owners:
            for name, value in vars(owner).items():
                if value is None:
                    now.append((owner, name, None))  # some are made when first used
                elif isinstance(value, torch.Tensor) and not value.requires_grad:
                    kept = before.get((id(owner), name))
                    if kept is None or not kept.is_of(value):
                        kept = _Kept(value)
                    now.append((owner, name, kept))
        self._kept = now

    def put_back(self) -> None:
        """Make all as it was, and have forgotten what functions remember."""
        for owner, name, kept in self._kept:
            if kept is not None:
                kept.copies.put_back()
                setattr(owner, name, kept.tensor)
            elif isinstance(getattr(owner, name, None), torch.Tensor):
                setattr(owner, name, None)
        functions: list[Any] = list(self._functions)
        for module in filter(None, map(sys.modules.get, _REMEMBERING)):
            functions += vars(module).values()
        for function in functions:
            forget = getattr(function, "cache_clear", None)
            if callable(forget):
                forget()


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.copies = Copies(tensor)
        self._version = tensor._version

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is the same, and nobody has changed it."""
        return self.tensor is tensor and self._version == tensor._version
