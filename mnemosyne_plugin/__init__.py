"""Mnemosyne: error recovery for LLM training, without restarts and checkpoints.

Importing this package has no side effect and imports neither torch nor a trainer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemosyne_plugin.adapters.ddp import attach as attach

__version__ = "0.1.0"
__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    if name == "attach":
        from mnemosyne_plugin.adapters.ddp import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
