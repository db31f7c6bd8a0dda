"""``--mnemosyne`` on Megatron-LM's command line: what is taken, what is refused."""

import argparse
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mnemosyne_plugin import recovery
from mnemosyne_plugin.adapters.megatron import arguments
from mnemosyne_plugin.adapters.megatron.training import hook
from mnemosyne_plugin.config import Config, DeviceProxyConfig
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.launch.script_config import device_proxy_choice


@pytest.fixture
def managed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recovery, "_installed", [object()])
    yield


def parse(*words: str, **megatron: object) -> Config | None:
    """Return what a run with these words, and these arguments of Megatron's, gets."""

    def parse_args() -> argparse.Namespace:
        parser = module.add_megatron_arguments(argparse.ArgumentParser())
        return parser.parse_args(words, argparse.Namespace(**megatron))

    module = SimpleNamespace(
        add_megatron_arguments=lambda parser: parser, parse_args=parse_args
    )
    arguments.hook(module)
    return arguments.config_of(module.parse_args())


def test_a_run_that_does_not_ask_for_us_gets_nothing() -> None:
    assert parse() is None


@pytest.mark.usefixtures("managed")
def test_each_option_sets_its_choice() -> None:
    assert parse("--mnemosyne") == Config()
    words = "--mnemosyne --mnemosyne-redundancy buddy --mnemosyne-buddies 2"
    words += " --mnemosyne-snapshot-every 3 --mnemosyne-on-state-lost restart"
    assert parse(*words.split()) == Config(
        redundancy="buddy", buddies=2, snapshot_every=3, on_state_lost="restart"
    )


@pytest.mark.usefixtures("managed")
@pytest.mark.parametrize(
    ("words", "megatron", "message"),
    [
        ("--mnemosyne-buddies 2", {}, "--mnemosyne-buddies needs --mnemosyne"),
        ("--mnemosyne --mnemosyne-buddies 0", {}, "--mnemosyne-buddies must be"),
        (
            "--mnemosyne",
            {"async_save": True, "async_strategy": "nvrx"},
            "--async-strategy nvrx yet; add --async-strategy mcore",
        ),
        ("--mnemosyne", {"iterations_to_skip": [3]}, "--iterations-to-skip"),
        (
            "--mnemosyne",
            {"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]},
            "of a full_iteration",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(
    words: str, megatron: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words.split(), **megatron)


def test_the_device_proxy_is_asked_for_before_megatron_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    manager = SimpleNamespace(configure_device_proxy=asked.append)
    monkeypatch.setattr(recovery, "_installed", [manager])
    choice = DeviceProxyConfig(enabled=True)
    words = ["--mnemosyne", "--mnemosyne-device-proxy"]
    assert parse(*words) == Config(device_proxy=choice)
    assert choice in asked
    assert device_proxy_choice(words) == choice  # of the script's arguments
    with pytest.raises(ConfigError, match="--mnemosyne-device-proxy needs --mnemosyne"):
        parse(words[1])


def test_the_option_needs_our_launcher() -> None:
    with pytest.raises(ConfigError, match="use `mnemosyne run` in place of torchrun"):
        parse("--mnemosyne")


def test_another_megatron_is_refused_when_it_is_imported() -> None:
    with pytest.raises(ConfigError, match=r"no train_step\(\); want 0.16 to 0.19"):
        hook(SimpleNamespace(setup_model_and_optimizer=print))
