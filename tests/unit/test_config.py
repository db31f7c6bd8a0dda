"""The user's input: sections, specs and backends are right, or a ConfigError."""

import subprocess
import sys

import pytest

from mnemosyne_plugin.chaos import Fault, parse
from mnemosyne_plugin.config import Config
from mnemosyne_plugin.errors import ConfigError


def test_a_section_may_be_empty_or_switch_us_off() -> None:
    assert Config.from_section({}).enabled
    assert not Config.from_section({"enabled": False}).enabled


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"enable": True}, "mnemosyne.enable"),
        ({"enabled": "yes"}, "mnemosyne.enabled"),
        ({"enabled": 1}, "mnemosyne.enabled"),
        ([], "mnemosyne"),
        (True, "mnemosyne"),
    ],
)
def test_a_wrong_section_is_named(section: object, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Config.from_section(section)


def test_a_chaos_spec_is_parsed() -> None:
    spec = "kill rank=2 step=12 phase=backward delay_ms=2.5"
    assert parse(spec) == Fault(2, 12, "backward", 2.5)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "stop rank=1 step=1 phase=vote",
        "kill rank=1 step=1",
        "kill rank=x step=1 phase=vote",
        "kill rank=1 step=1 phase=lunch",
        "kill rank=1 step=1 phase=vote colour=red",
        "kill rank",
        "kill rank=-1 step=1 phase=vote",
        "kill rank=1 step=1 phase=vote delay_ms=nan",
    ],
)
def test_a_wrong_chaos_spec_is_a_config_error(spec: str) -> None:
    with pytest.raises(ConfigError):
        parse(spec)


def test_importing_the_package_or_its_entry_point_imports_neither_torch_nor_us() -> (
    None
):
    code = (
        "import sys, mnemosyne_plugin.autoload as a; a.autoload();"
        "assert 'torch' not in sys.modules; assert 'deepspeed' not in sys.modules;"
        "ours = {m for m in sys.modules if m.startswith('mnemosyne_plugin')};"
        "assert ours == {'mnemosyne_plugin', 'mnemosyne_plugin.autoload'}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
