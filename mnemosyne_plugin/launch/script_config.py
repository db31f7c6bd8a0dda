"""What `mnemosyne run` has to know of a script's choices before python starts.

Only where its arguments name the ds_config in one of the usual ways, or are Megatron's.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from mnemosyne_plugin.config import Config, DeviceProxyConfig

_OF_MEGATRON = "--mnemosyne-device-proxy"
_OPTIONS = ("--deepspeed_config", "--ds_config", "--deepspeed")


def device_proxy_choice(arguments: Sequence[str]) -> DeviceProxyConfig | None:
    """Return what a script with these arguments, or its ds_config, asks for; or None.

    Raises ConfigError if its section is wrong. A file that cannot be read is for the
    script to complain of.
    """
    if _OF_MEGATRON in arguments:
        return DeviceProxyConfig()
    for name in _named_files(arguments):
        try:
            content = json.loads(Path(name).read_text())
        except (OSError, ValueError):
            continue
        section = content.get("mnemosyne") if isinstance(content, dict) else None
        if section is None:
            continue
        config = Config.from_section(section)
        return config.device_proxy if config.enabled else None
    return None


def _named_files(arguments: Sequence[str]) -> list[str]:
    names = []
    for argument, following in pairwise([*arguments, ""]):
        option, _, value = argument.partition("=")
        if option.startswith("--") and "--" + option[2:].replace("-", "_") in _OPTIONS:
            names.append(value or following)
    return names
