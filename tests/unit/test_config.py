"""The user's input: sections, specs and backends are right, or a ConfigError."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mnemosyne_plugin.adapters.redundancy import Redundancy
from mnemosyne_plugin.chaos import Fault, parse
from mnemosyne_plugin.config import Config, DeviceProxyConfig
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.launch import run
from mnemosyne_plugin.launch.script_config import device_proxy_choice
from mnemosyne_plugin.state.snapshot import Footprint


@pytest.mark.parametrize(
    "section", [{"checkpoint_dir": "here"}, {"on_state_lost": "restart"}]
)
def test_what_no_redundancy_would_leave_undone_is_refused(
    section: dict[str, str],
) -> None:
    config = Config.from_section({"redundancy": "none"} | section)
    with pytest.raises(ConfigError, match="redundancy is 'none'"):
        Redundancy.of(config, True, [0, 0])


def test_a_section_may_be_empty_or_switch_us_off() -> None:
    assert Config.from_section({}).enabled
    assert not Config.from_section({"enabled": False}).enabled


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"enable": True}, "mnemosyne.enable"),
        ({"enabled": "yes"}, "mnemosyne.enabled"),
        ({"enabled": 1}, "mnemosyne.enabled"),
        ({"redundancy": "mirror"}, "mnemosyne.redundancy"),
        ({"redundancy": True}, "mnemosyne.redundancy"),
        ({"redundancy": ["buddy"]}, "mnemosyne.redundancy"),
        ({"buddies": 0}, "mnemosyne.buddies"),
        ({"buddies": -1}, "mnemosyne.buddies"),
        ({"buddies": True}, "mnemosyne.buddies"),
        ({"buddies": 1.0}, "mnemosyne.buddies"),
        ({"snapshot_every": 0}, "mnemosyne.snapshot_every"),
        ({"snapshot_every": False}, "mnemosyne.snapshot_every"),
        ({"snapshot_every": "3"}, "mnemosyne.snapshot_every"),
        ({"on_state_lost": "maybe"}, "mnemosyne.on_state_lost"),
        ({"on_state_lost": 3}, "mnemosyne.on_state_lost"),
        ({"device_proxy": True}, "'mnemosyne.device_proxy' must be an object"),
        ({"device_proxy": {"enable": True}}, "mnemosyne.device_proxy.enable;"),
        ({"device_proxy": {"enabled": 1}}, "mnemosyne.device_proxy.enabled must be"),
        ({"device_proxy": {"timeout_s": 0}}, "device_proxy.timeout_s must be seconds"),
        ({"device_proxy": {"timeout_s": True}}, "device_proxy.timeout_s must be"),
        ({"device_proxy": {"timeout_s": "9"}}, "device_proxy.timeout_s must be"),
        ([], "mnemosyne"),
        (True, "mnemosyne"),
    ],
)
def test_a_wrong_section_is_named(section: object, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Config.from_section(section)


def test_a_section_says_whether_it_wants_the_device_proxy() -> None:
    assert Config.from_section({}).device_proxy is None
    config = Config.from_section({"device_proxy": {"timeout_s": 30}})
    assert config.device_proxy == DeviceProxyConfig(enabled=True, timeout_s=30)


@pytest.mark.parametrize(
    "options",
    [
        ["--deepspeed_config", "FILE"],
        ["--steps", "9", "--deepspeed_config=FILE", "--seed=1"],
        ["--deepspeed-config", "FILE"],
        ["--ds_config", "FILE"],
        ["--deepspeed", "FILE"],  # of transformers
        ["--deepspeed", "--deepspeed_config", "FILE"],
    ],
)
def test_the_launcher_reads_a_ds_config_that_the_arguments_name(
    options: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds_config.json"
    arguments = [option.replace("FILE", str(path)) for option in options]
    assert device_proxy_choice([]) is None
    assert device_proxy_choice(arguments) is None  # no such file: the script says so
    for content in ("{", "[]", "{}", '{"mnemosyne": {}}'):
        path.write_text(content)
        assert device_proxy_choice(arguments) is None
    section: dict[str, object] = {"device_proxy": {"enabled": False}}
    path.write_text(json.dumps({"mnemosyne": section}))
    assert device_proxy_choice(arguments) == DeviceProxyConfig(enabled=False)
    path.write_text(json.dumps({"mnemosyne": {**section, "enabled": False}}))
    assert device_proxy_choice(arguments) is None  # all of us is off
    path.write_text('{"mnemosyne": {"device_proxy": 1}}')
    with pytest.raises(ConfigError, match="must be an object"):
        device_proxy_choice(arguments)


def run_arguments(tmp_path: Path, *options: str, enabled: bool) -> argparse.Namespace:
    """Return what `mnemosyne run` makes of options, and of a ds_config."""
    path = tmp_path / "ds_config.json"
    section = {"device_proxy": {"enabled": enabled}}
    path.write_text(json.dumps({"mnemosyne": section}))
    words = [*options, __file__, f"--deepspeed_config={path}"]
    args = run.get_parser().parse_args(words)
    run._check(args)
    return args


def test_a_ds_config_switches_the_device_proxy_on(tmp_path: Path) -> None:
    assert run_arguments(tmp_path, enabled=True).device_proxy
    assert not run_arguments(tmp_path, enabled=False).device_proxy
    with pytest.raises(ConfigError, match="leave one out"):
        run_arguments(tmp_path, "--device-proxy", enabled=False)


@pytest.mark.parametrize(
    ("word", "is_sharded", "kind"),
    [
        ("auto", False, "replica"),
        ("auto", True, "buddy"),
        ("replica", False, "replica"),
        ("buddy", False, "buddy"),
        ("buddy", True, "buddy"),
        ("none", True, "none"),
    ],
)
def test_redundancy_follows_from_the_word_and_the_state(
    word: str, is_sharded: bool, kind: str
) -> None:
    config = Config.from_section({"redundancy": word})
    assert Redundancy.of(config, is_sharded, [0, 0]).kind == kind


def test_replicas_of_sharded_state_are_refused_with_the_reason() -> None:
    config = Config(redundancy="replica")
    with pytest.raises(ConfigError, match=r"redundancy.*no other rank has"):
        Redundancy.of(config, True, [0, 0])


def test_a_rank_cannot_have_more_buddies_than_there_are_others() -> None:
    assert Redundancy.of(Config(buddies=3), True, [0] * 4).num_buddies == 3
    with pytest.raises(ConfigError, match=r"mnemosyne.buddies is 4.* only 3 others"):
        Redundancy.of(Config(buddies=4), True, [0] * 4)


@pytest.mark.parametrize(
    ("section", "is_sharded", "nodes", "words"),
    [
        ({}, False, [0, 0, 1, 1], "(replicas)"),
        ({}, True, [0, 0, 1, 1], "snapshots each step, here and with a buddy on ano"),
        ({}, True, [0, 0, 0, 1], "a buddy on the same node: its loss loses both"),
        ({"buddies": 2, "snapshot_every": 3}, True, [0] * 4, "each 3 steps, here and "),
        ({"buddies": 2}, True, [0] * 4, "2 buddies on the same node: its loss loses"),
        ({"redundancy": "none"}, True, [0, 0], "NOT protected"),
    ],
)
def test_the_start_line_says_what_protects(
    section: dict[str, object], is_sharded: bool, nodes: list[int], words: str
) -> None:
    redundancy = Redundancy.of(Config.from_section(section), is_sharded, nodes)
    assert words in redundancy.start_line(has_loader=True)


def test_what_snapshots_cost_is_said_in_sizes_one_can_read() -> None:
    config = Config(redundancy="buddy", buddies=2, snapshot_every=3)
    line = Redundancy.of(config, False, [0] * 4).footprint_line(
        Footprint(image_bytes=1_524_000, sent_bytes=3_048_000, host_bytes=999)
    )
    assert "has 1.52 MB; each 3 steps it sends 3.05 MB" in line
    assert "keeps 999 bytes of host memory" in line


def test_a_chaos_spec_is_parsed() -> None:
    spec = "kill rank=2 step=12 phase=backward delay_ms=2.5"
    assert parse(spec) == Fault((2,), 12, "backward", delay_ms=2.5)
    assert parse("kill rank=1,2 step=0 phase=data") == Fault((1, 2), 0, "data")
    assert parse("kill rank=0 step=1 phase=p2p nth=3") == Fault((0,), 1, "p2p", 3)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "stop rank=1 step=1 phase=vote",
        "kill rank=1 step=1",
        "kill rank=x step=1 phase=vote",
        "kill rank=1, step=1 phase=vote",
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
