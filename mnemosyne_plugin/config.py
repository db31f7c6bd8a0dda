"""The user's choices: one frozen dataclass, built from the section of ds_config."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mnemosyne_plugin.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What the ``"mnemosyne"`` section of ds_config may hold."""

    enabled: bool = True
    """False leaves the trainer untouched: no hooks, no protection."""

    @classmethod
    def from_section(cls, section: object) -> "Config":
        """Build from a parsed JSON section; raises ConfigError naming the field."""
        if not isinstance(section, Mapping):
            raise ConfigError(
                "ds_config: 'mnemosyne' must be an object, got "
                f"{type(section).__name__}"
            )
        known = {field.name: field.type for field in fields(cls)}
        for key, value in section.items():
            if key not in known:
                raise ConfigError(
                    f"ds_config: unknown key mnemosyne.{key}; known: {sorted(known)}"
                )
            _check_type(key, value, known[key])
        return cls(**section)


def _check_type(key: str, value: Any, want: Any) -> None:
    if want is bool and not isinstance(value, bool):
        raise ConfigError(
            f"ds_config: mnemosyne.{key} must be true or false, got {value!r}"
        )
