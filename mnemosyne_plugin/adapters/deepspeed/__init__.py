"""DeepSpeed: protects an engine, as the ``"mnemosyne"`` section of ds_config asks."""

import functools
import os
from collections.abc import Callable
from typing import Any

from mnemosyne_plugin import recovery
from mnemosyne_plugin.config import Config
from mnemosyne_plugin.errors import ConfigError


def hook(deepspeed: Any) -> None:
    """Wrap ``deepspeed.initialize``; called right after the module was imported."""
    if not callable(getattr(deepspeed, "initialize", None)):
        raise ConfigError("this DeepSpeed has no initialize(); want 0.19.8 to 0.19.x")
    if "MNEMOSYNE_WORKER" in os.environ:
        # Our backend serves the groups of a process that `mnemosyne run` started, so
        # the shared-memory op (a compile of 47 s at first use) would never be called.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.initialize = _protecting(deepspeed.initialize)


def _protecting(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(initialize)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        engine, optimizer, loader, scheduler = initialize(*args, **kwargs)
        section = (engine.config or {}).get("mnemosyne")
        if section is not None and Config.from_section(section).enabled:
            loader = attach(engine, loader)
        return engine, optimizer, loader, scheduler

    return wrapper


def attach(engine: Any, loader: Any = None) -> Any:
    """Protect ``engine``; returns the loader to use in place of ``loader``.

    On a newcomer it returns with the job's state in place. Raises ConfigError if this
    process was not started by `mnemosyne run`, or the engine is of a kind that is not
    protected yet.
    """
    manager = recovery.current()
    if manager is None:
        raise ConfigError(
            "ds_config has a 'mnemosyne' section, but this process was not started by "
            "`mnemosyne run`: a launcher that kills all workers when one dies leaves "
            "nothing to recover; use `mnemosyne run`, or set mnemosyne.enabled to false"
        )
    # Imported here, so that a process that only imports deepspeed does not pay for it.
    from mnemosyne_plugin.adapters.deepspeed.hooks import EngineHooks, check_targets
    from mnemosyne_plugin.adapters.deepspeed.loader import PositionedLoader
    from mnemosyne_plugin.adapters.deepspeed.state import EngineState, check_supported

    check_targets(engine)
    check_supported(engine)
    position = PositionedLoader(loader, manager) if loader is not None else None
    if position is not None:
        engine.training_dataloader = position
    if manager.rank == 0 and not manager.is_setting_up_alone:
        print(_summary(manager.world_size, position is not None), flush=True)
    manager.attach(EngineState(engine), position)
    EngineHooks(engine, manager).install()
    return position


def _summary(world_size: int, has_loader: bool) -> str:
    data = (
        "data position (loader of initialize)"
        if has_loader
        else "NOT the data position (no training_data: start at engine.global_steps)"
    )
    return (
        f"mnemosyne: {world_size} ranks protected against the death of workers: "
        f"parameters, optimizer, LR scheduler (replicas), RNG and {data}; "
        "not yet: hangs, loss of a node, collectives outside of the training step"
    )
