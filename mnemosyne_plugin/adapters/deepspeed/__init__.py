"""DeepSpeed: protects an engine, as the ``"mnemosyne"`` section of ds_config asks."""

import functools
import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mnemosyne_plugin import recovery
from mnemosyne_plugin.config import Config
from mnemosyne_plugin.errors import ConfigError

if TYPE_CHECKING:
    from mnemosyne_plugin.recovery.manager import Manager


_CLASSES = {
    "deepspeed.runtime.engine": "DeepSpeedEngine",
    "deepspeed.runtime.pipe.engine": "PipelineEngine",
}


def hook(engine_module: Any) -> None:
    """Have every engine protected when it is built, if its config asks for it.

    Called right after a module of DeepSpeed with an engine class was imported.
    """
    name = _CLASSES[engine_module.__name__]
    engine_class = getattr(engine_module, name, None)
    if engine_class is None:
        raise ConfigError(f"this DeepSpeed has no {name}; want 0.19.8 to 0.19.x")
    if "MNEMOSYNE_WORKER" in os.environ:
        _leave_out_shm_op()
        _hook_loaders()
    initialize = engine_class.__init__

    @functools.wraps(initialize)
    def wrapper(engine: Any, *args: Any, **kwargs: Any) -> None:
        is_whole = "_mnemosyne_is_building" not in vars(engine)
        vars(engine)["_mnemosyne_is_building"] = True
        given = kwargs.get("config")
        if isinstance(given, dict) and _is_enabled(given):
            _manager(given)  # refuse before the engine is built
        initialize(engine, *args, **kwargs)
        if is_whole and _is_enabled(engine.config or {}):  # not inside of a subclass's
            attach(engine)

    engine_class.__init__ = wrapper


def _hook_loaders() -> None:
    from mnemosyne_plugin.adapters.deepspeed.loader import hook_loaders

    hook_loaders(importlib.import_module("deepspeed.runtime.dataloader"))


def _leave_out_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory op (47 s at first use).

    In a process that `mnemosyne run` started, our backend serves the groups, so the op
    would never be called.
    """
    # As an attribute, deepspeed.comm.torch is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    if not callable(getattr(backend, "build_shm_op", None)):
        raise ConfigError("DeepSpeed has no build_shm_op; want 0.19.8 to 0.19.x")
    backend.build_shm_op = lambda: None


def attach(engine: Any) -> None:
    """Protect ``engine``, and the data loader that it made from ``training_data``.

    On a newcomer it returns with the job's state in place. Raises ConfigError if this
    process was not started by `mnemosyne run`, or the engine is of a kind that is not
    protected yet.
    """
    manager = _manager(engine.config or {})
    config = Config.from_section((engine.config or {}).get("mnemosyne", {}))
    # Imported here, so that a process that only imports deepspeed does not pay for it.
    from mnemosyne_plugin.adapters import lost_device
    from mnemosyne_plugin.adapters.deepspeed import hooks, pipe
    from mnemosyne_plugin.adapters.deepspeed.checkpoint import Checkpoints
    from mnemosyne_plugin.adapters.deepspeed.state import EngineState, make_repeatable
    from mnemosyne_plugin.adapters.deepspeed.support import (
        check_supported,
        refuse_with_device_proxy,
    )
    from mnemosyne_plugin.adapters.deepspeed.zero import STAGES, ZeroState
    from mnemosyne_plugin.adapters.redundancy import Redundancy
    from mnemosyne_plugin.data import positions, resumable

    is_pipeline = engine.pipeline_parallelism
    (pipe if is_pipeline else hooks).check_targets(engine)
    check_supported(engine)
    if manager.has_device_proxy:
        refuse_with_device_proxy(engine, manager)
    is_zero = type(engine.optimizer).__name__ in STAGES
    is_sharded = is_zero or is_pipeline or engine.has_moe_layers
    redundancy = Redundancy.of(config, is_sharded, manager.nodes)
    is_to_speak = manager.rank == 0 and not manager.is_setting_up_alone
    if redundancy.kind == "none":
        if is_to_speak:
            print(redundancy.start_line(has_loader=False), flush=True)
        return
    state = ZeroState(engine) if is_zero else EngineState(engine)
    if manager.has_device_proxy and isinstance(state, ZeroState):
        state.keep_frozen()
    make_repeatable(state.optimizer)
    # A pipeline engine's is in a RepeatingLoader, which has wrapped it.
    if engine.training_dataloader is not None and not is_pipeline:
        engine.training_dataloader = resumable(engine.training_dataloader)
    if is_to_speak:
        print(redundancy.start_line(has_loader=bool(positions())), flush=True)
    kind = pipe.PipelineHooks if is_pipeline else hooks.EngineHooks
    engine_hooks = kind(engine, state, manager)
    may_restart = config.on_state_lost == "restart"
    if redundancy.kind == "replica":
        assert isinstance(state, EngineState)
        manager.attach(state, positions(), may_restart=may_restart)
    else:
        manager.attach(
            state.replicated(),
            positions(),
            shard=state,
            redo=engine_hooks.catch_up,
            num_buddies=config.buddies,
            snapshot_every=config.snapshot_every,
            on_footprint=redundancy.tell if is_to_speak else None,
            may_restart=may_restart,
        )
    engine_hooks.install()
    if is_to_speak:
        lost_device.tell(manager)
    checkpoints = Checkpoints(
        engine, state, engine_hooks, manager, config.checkpoint_dir
    )
    checkpoints.install()
    checkpoints.join()


def _is_enabled(config: Mapping[str, Any]) -> bool:
    section = config.get("mnemosyne")
    return section is not None and Config.from_section(section).enabled


def _manager(ds_config: Mapping[str, Any]) -> "Manager":
    manager = recovery.current()
    if manager is None:
        raise ConfigError(
            "ds_config has a 'mnemosyne' section, but this process was not started by "
            "`mnemosyne run`: a launcher that kills all workers when one dies leaves "
            "nothing to recover; use `mnemosyne run`, or set mnemosyne.enabled to false"
        )
    section = ds_config.get("mnemosyne", {})
    manager.configure_device_proxy(Config.from_section(section).device_proxy)
    return manager
