"""The ``torch.backends`` entry point: ``import torch`` calls ``autoload`` by itself.

It only sets a hook that runs right after a trainer's modules were imported. All the
rest is imported when it is needed: a process that never uses us pays less than a
millisecond (wrapt's post-import hooks would do, but importing wrapt takes longer).
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_DEEPSPEED = "mnemosyne_plugin.adapters.deepspeed"
_MEGATRON = "mnemosyne_plugin.adapters.megatron"
# Which of our modules has the ``hook`` for one of a trainer's. Not for a package: it
# may be importing torch now.
_HOOKS = {
    "deepspeed.runtime.engine": _DEEPSPEED,
    "deepspeed.runtime.pipe.engine": _DEEPSPEED,
    "megatron.training.arguments": f"{_MEGATRON}.arguments",
    "megatron.training.training": f"{_MEGATRON}.training",
}


def autoload() -> None:
    """Set the hook. Called by torch at the end of its import."""
    if not is_on():
        sys.meta_path.insert(0, _PostImport())


def is_on() -> bool:
    """Whether the hook is set in this process."""
    return any(isinstance(finder, _PostImport) for finder in sys.meta_path)


class _PostImport:
    """A meta-path finder that finds nothing new: it has a module's loader call us."""

    _is_searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        """Return what the other finders find, with a loader that runs the hook."""
        if name not in _HOOKS or self._is_searching:
            return None
        self._is_searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_searching = False
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
        importlib.import_module(_HOOKS[module.__name__]).hook(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
