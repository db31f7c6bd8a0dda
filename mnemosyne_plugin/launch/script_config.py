"""What `mnemosyne run` has to know of a ds_config before python starts.

Only where the script's arguments name the file, in one of the usual ways.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mnemosyne_plugin.config import Config, DeviceProxyConfig

_OPTIONS = ("--deepspeed_config", "--ds_config", "--deepspeed")


def device_proxy_choice(arguments: Sequence[str]) -> DeviceProxyConfig | None:
    """Return what the ds_config of a script with these arguments says; else None.

    Raises ConfigError if its section is wrong. A file that cannot be read is for the
    script to complain of.
    """
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
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = argument.partition("=")
        if option.startswith("--") and "--" + option[2:].replace("-", "_") in _OPTIONS:
            names.append(value or following)
    return names
