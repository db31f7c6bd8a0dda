"""Every exception type of Mnemosyne, in two families.

Recoverable errors are for the manager, which repairs the job and goes on; fatal
ones are for the user. ``csrc/common/error.h`` carries the same names.
"""


class MnemosyneError(RuntimeError):
    """Root of all errors that Mnemosyne raises itself."""


class RecoverableError(MnemosyneError):
    """The step failed, but the job can be repaired without the user."""


class PeerLost(RecoverableError):
    """A worker died, or its link broke.

    rank: the global rank that it held, or -1 if unknown; epoch: when it was seen.
    """

    def __init__(self, message: str, rank: int = -1, epoch: int = -1) -> None:
        super().__init__(message)
        self.rank = rank
        self.epoch = epoch


class CollectiveTimeout(RecoverableError):
    """A collective did not finish before its deadline; the peers may be hung."""

    def __init__(self, message: str, rank: int = -1, epoch: int = -1) -> None:
        super().__init__(message)
        self.rank = rank
        self.epoch = epoch


class StaleEpoch(RecoverableError):
    """The group moved on to a newer epoch, so this operation was cancelled."""

    def __init__(self, message: str, rank: int = -1, epoch: int = -1) -> None:
        super().__init__(message)
        self.rank = rank
        self.epoch = epoch


class GroupAborted(RecoverableError):
    """The group was aborted or shut down, by this rank or by ``rank``.

    Other groups go on; this one does when it is reconfigured.
    """

    def __init__(self, message: str, rank: int = -1, epoch: int = -1) -> None:
        super().__init__(message)
        self.rank = rank
        self.epoch = epoch


class FatalError(MnemosyneError):
    """The job cannot go on; the message says what the user can do."""


class NoSourceForState(FatalError):
    """No live rank holds a copy of state that a newcomer needs."""

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class GraphLost(FatalError):
    """A CUDA graph holds operations of a group that was made anew since."""


class OutOfDeviceMemory(FatalError):
    """A device has no room for what a repair needs, beside what the script has."""


class StateMismatch(FatalError):
    """What a peer holds does not fit what this rank expects."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class CollectiveMismatch(FatalError, ValueError):
    """Two ranks disagree on an operation: kind, size, type or root."""


class ConfigError(FatalError, ValueError):
    """The user's input breaks a rule; the message names the field and the rule."""
