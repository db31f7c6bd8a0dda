"""Agree on what happened, and resume. One manager per process, found here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnemosyne_plugin.recovery.manager import Manager

_installed: "list[Manager]" = []


def install(manager: "Manager") -> None:
    """Make ``manager`` the one of this process. The launcher calls it once."""
    if _installed:
        raise ValueError("this process has a manager already")
    _installed.append(manager)


def current() -> "Manager | None":
    """Return the manager of this process; None if `mnemosyne run` did not start it."""
    return _installed[0] if _installed else None
