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
class DeviceProxyConfig:
    """What ``"device_proxy"`` in that section may hold."""

    enabled: bool = True
    """The script must run under `mnemosyne run --device-proxy`; false: must not."""
    timeout_s: float | None = None
    """How long a device may take until it counts as hung; None: as the launcher says.

    ``--device-timeout`` goes first.
    """


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
    device_proxy: DeviceProxyConfig | None = None
    """Whether each GPU is in a process of its own; None: as the launcher says."""

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
        values = _checked(cls, section, prefix, named)
        if "device_proxy" in values:
            inner = prefix + named("device_proxy") + "."
            proxy = _checked(DeviceProxyConfig, values["device_proxy"], inner, named)
            values["device_proxy"] = DeviceProxyConfig(**proxy)
        return cls(**values)


def _checked(
    kind: type, section: object, prefix: str, named: Callable[[str], str]
) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        where, _, name = prefix.rstrip(".").rpartition(" ")
        raise ConfigError(
            f"{where} {name!r} must be an object, got {type(section).__name__}".strip()
        )
    known = {field.name: field.type for field in fields(kind)}
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"unknown key: {prefix}{key}; known: {sorted(known)}")
        _check(prefix + named(key), key, value, known[key])
    return dict(section)


def _check(name: str, key: str, value: Any, want: Any) -> None:
    if want is bool and not isinstance(value, bool):
        expected = "true or false"
    elif want is int and (type(value) is not int or value < 1):
        expected = "a whole number, 1 or more"
    elif want is str and not isinstance(value, str):
        expected = "text"
    elif key == "timeout_s" and not _is_duration(value):
        expected = "seconds, more than 0"
    elif value not in CHOICES.get(key, (value,)):
        expected = f"one of {', '.join(CHOICES[key])}"
    else:
        return
    raise ConfigError(f"{name} must be {expected}, got {value!r}")


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")
