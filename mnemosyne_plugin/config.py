"""The user's choices: one frozen dataclass, from ds_config or a command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mnemosyne_plugin.errors import ConfigError

CHOICES = {
    "redundancy": ("auto", "replica", "buddy", "none"),
    "on_state_lost": ("stop", "restart"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What the ``"mnemosyne"`` section of ds_config may hold.

    Megatron-LM's ``--mnemosyne-*`` options are named after these.
    """

    enabled: bool = True
    """False leaves the trainer untouched: no hooks, no protection."""
    redundancy: str = "auto"
    """What a lost worker's state comes back from.

    replica: ranks with the same state. buddy: snapshots in another rank's memory.
    auto: replicas where all state has some, else buddies. none: nothing is kept, the
    trainer is left untouched, and a death starts the job again, at most three times.
    """
    buddies: int = 1
    """How many other ranks keep a snapshot of each."""
    snapshot_every: int = 1
    """Steps from one snapshot to the next; up to twice as many are made again."""
    checkpoint_dir: str = ""
    """Where a job that is told to end by a signal saves its state first."""
    on_state_lost: str = "stop"
    """What happens when state is lost with all who held a copy of it.

    stop: the job ends. restart: all workers start again, at most three times or
    --max-restarts, and the script loads its newest checkpoint.
    """

    @classmethod
    def from_section(
        cls,
        section: object,
        prefix: str = "ds_config: mnemosyne.",
        named: Callable[[str], str] = str,
    ) -> "Config":
        """Build from a parsed JSON section; raises ConfigError naming the field.

        prefix, named: how to write a field's name for the user.
        """
        if not isinstance(section, Mapping):
            raise ConfigError(
                "ds_config: 'mnemosyne' must be an object, got "
                f"{type(section).__name__}"
            )
        known = {field.name: field.type for field in fields(cls)}
        for key, value in section.items():
            if key not in known:
                raise ConfigError(f"unknown key: {prefix}{key}; known: {sorted(known)}")
            _check(prefix + named(key), key, value, known[key])
        return cls(**section)


def _check(name: str, key: str, value: Any, want: Any) -> None:
    if want is bool and not isinstance(value, bool):
        expected = "true or false"
    elif want is int and (type(value) is not int or value < 1):
        expected = "a whole number, 1 or more"
    elif want is str and not isinstance(value, str):
        expected = "text"
    elif value not in CHOICES.get(key, (value,)):
        expected = f"one of {', '.join(CHOICES[key])}"
    else:
        return
    raise ConfigError(f"{name} must be {expected}, got {value!r}")
