"""Megatron-LM's command line: ``--mnemosyne``, and one option for each choice."""

import argparse
import functools
from dataclasses import fields
from typing import Any

from mnemosyne_plugin import recovery
from mnemosyne_plugin.config import CHOICES, Config
from mnemosyne_plugin.errors import ConfigError

_HELP = {
    "redundancy": "what a lost worker's state comes back from; buddy: snapshots in "
    "another rank's memory",
    "buddies": "how many other ranks keep a snapshot of each",
    "snapshot_every": "steps from one snapshot to the next; up to twice as many are "
    "made again",
    "on_state_lost": "when a rank and its buddies are lost together: stop the job, or "
    "restart all workers from the newest checkpoint",
}
# Whole jobs that this version does not protect: the argument, and what it is.
_UNPROTECTED = {
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "iterations_to_skip": "--iterations-to-skip",
    "perform_rl_step": "--perform-rl-step",
    "inprocess_restart": "--inprocess-restart",
    "enable_ft_package": "--enable-ft-package",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "optimizer_cuda_graph": "--optimizer-cuda-graph",
    "full_validation": "--full-validation",
    # Ranks that see a failure and ranks that do not would decide apart.
    "exit_duration_in_mins": "--exit-duration-in-mins",
    "exit_signal_handler": "--exit-signal-handler",
    "adlr_autoresume": "--adlr-autoresume",
    "check_weight_hash_across_dp_replicas_interval": (
        "--check-weight-hash-across-dp-replicas-interval"
    ),
    "overlap_param_gather_with_optimizer_step": (
        "--overlap-param-gather-with-optimizer-step"
    ),
}


def hook(module: Any) -> None:
    """Add the options. Called right after ``megatron.training.arguments`` was loaded.

    A second call does nothing: a source tree may be patched as well. Raises ConfigError
    if it is not as in Megatron-LM 0.16 to 0.19.
    """
    if hasattr(module, "_has_mnemosyne"):
        return
    module._has_mnemosyne = True
    for name in ("add_megatron_arguments", "parse_args"):
        if not callable(getattr(module, name, None)):
            raise ConfigError(f"megatron.training.arguments has no {name}()")
    add, parse = module.add_megatron_arguments, module.parse_args

    @functools.wraps(add)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> Any:
        return _add_options(add(parser))

    @functools.wraps(parse)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        config_of(parsed)
        return parsed

    module.add_megatron_arguments = add_megatron_arguments
    module.parse_args = parse_args


def config_of(args: argparse.Namespace) -> Config | None:
    """Return what the command line asks for; None if it does not ask for us.

    Raises ConfigError if an option was given that cannot take effect.
    """
    given: dict[str, Any] = {
        name: value
        for name in _HELP
        if (value := getattr(args, f"mnemosyne_{name}", None)) is not None
    }
    if getattr(args, "mnemosyne_device_proxy", False):
        given["device_proxy"] = {"enabled": True}
    if not getattr(args, "mnemosyne", False):
        for name in given:
            raise ConfigError(f"--mnemosyne-{_dashed(name)} needs --mnemosyne as well")
        return None
    manager = recovery.current()
    if manager is None:
        raise ConfigError(
            "--mnemosyne is given, but this process was not started by `mnemosyne "
            "run`: a launcher that kills all workers when one dies leaves nothing to "
            "recover; use `mnemosyne run` in place of torchrun, or leave it out"
        )
    for name, option in _UNPROTECTED.items():
        if getattr(args, name, None):
            raise ConfigError(f"mnemosyne cannot protect {option} yet; leave one out")
    # It is captured behind a barrier, at which a newcomer would be alone.
    graphs = (getattr(args, f"cuda_graph_{name}", "") for name in ("impl", "scope"))
    if any("full_iteration" in str(each) for each in graphs):
        raise ConfigError(
            "mnemosyne cannot protect CUDA graphs of a full_iteration; leave one out"
        )
    strategy = getattr(args, "async_strategy", "mcore")
    if getattr(args, "async_save", False) and strategy != "mcore":
        raise ConfigError(
            f"mnemosyne cannot protect --async-save by --async-strategy {strategy} "
            "yet; add --async-strategy mcore"
        )
    config = Config.from_section(given, "--mnemosyne-", _dashed)
    if config.device_proxy is not None:
        manager.configure_device_proxy(config.device_proxy)
    return config


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("mnemosyne", "recovery from lost workers")
    group.add_argument(
        "--mnemosyne",
        action="store_true",
        help="survive the loss of workers without a restart; needs `mnemosyne run`",
    )
    group.add_argument(
        "--mnemosyne-device-proxy",
        action="store_true",
        help="survive the loss of a GPU without a new process; `mnemosyne run "
        "--device-proxy` does the same",
    )
    defaults = {field.name: field.default for field in fields(Config)}
    for name, text in _HELP.items():
        choices = [c for c in CHOICES.get(name, ()) if c not in ("replica", "none")]
        group.add_argument(
            f"--mnemosyne-{_dashed(name)}",
            type=type(defaults[name]),
            choices=choices or None,
            help=f"{text} (default: {defaults[name]})",
        )
    return parser


def _dashed(name: str) -> str:
    return name.replace("_", "-")
