"""The ``torch.backends`` entry point: ``import torch`` calls ``autoload`` by itself.

It only sets a hook that runs right after DeepSpeed was imported. Everything else is
imported when it is needed: a process that never uses us pays less than a millisecond.
"""

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def autoload() -> None:
    """Set the hooks. Called by torch at the end of its import."""
    if "deepspeed" in sys.modules:
        _hook_deepspeed(sys.modules["deepspeed"])
    elif not any(isinstance(finder, _PostImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImport())


def _hook_deepspeed(module: ModuleType) -> None:
    from mnemosyne_plugin.adapters.deepspeed import hook

    hook(module)


class _PostImport:
    """A meta-path finder that finds nothing new: it runs our hook after deepspeed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        if name != "deepspeed":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(spec.loader)  # type: ignore[assignment]
        return spec


class _HookedLoader:
    """Loads as ``loader`` does, then runs the hook."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _hook_deepspeed(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
