"""DeepSpeed's checkpoints in a job whose workers may die.

A checkpoint is written next to where it belongs and put there when it is whole: until
then the older one stays. A newcomer has the state of the job, and loads none.
"""

import ctypes
import inspect
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from mnemosyne_plugin.adapters.deepspeed.loader import start_over
from mnemosyne_plugin.adapters.deepspeed.state import EngineState
from mnemosyne_plugin.adapters.deepspeed.zero import ZeroState
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.manager import Manager

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class _Hooks(Protocol):
    @property
    def is_in_step(self) -> bool:
        """Whether a step is under way."""

    def catch_up(self) -> Any:
        """Repair the job, and make again what it has gone back behind."""


class Checkpoints:
    """Wraps ``save_checkpoint`` and ``load_checkpoint`` of one engine."""

    def __init__(
        self,
        engine: Any,
        state: EngineState | ZeroState,
        hooks: _Hooks,
        manager: Manager,
        stop_dir: str,
    ) -> None:
        """stop_dir: where the job saves its state when it must end, or ""."""
        self._stop_dir = stop_dir
        self._engine = engine
        self._state = state
        self._hooks = hooks
        self._manager = manager
        self._last = (-1, 0)

    def install(self) -> None:
        """Put the wrappers in place."""
        self._save = self._engine.save_checkpoint
        self._load = self._engine.load_checkpoint
        self._engine.save_checkpoint = self.save
        self._engine.load_checkpoint = self.load
        if self._stop_dir:
            self._manager.offer_stop(self.stop)

    # --- load ---------------------------------------------------------------------

    def load(self, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        """In place of engine.load_checkpoint."""
        manager = self._manager
        if manager.is_setting_up_alone:
            print(
                f"mnemosyne: rank {manager.rank} takes over at step "
                f"{self._engine.global_steps}: the checkpoint in {load_dir} is not "
                "loaded over the state of the job",
                flush=True,
            )
            start_over()
            return _read(self._engine, load_dir, *args, **kwargs)
        if manager.has_snapshots:
            return self._load_together(load_dir, *args, **kwargs)
        # A newcomer does none of its collectives.
        manager.mesh.hold_replay(True)
        try:
            result = self._load(load_dir, *args, **kwargs)
        finally:
            manager.mesh.hold_replay(False)
        self._loaded(result)
        return result

    def join(self) -> None:
        """On a newcomer: load what the others are loading, if that is so."""
        what = dict(self._manager.owed)
        if what and what.pop("version") == self._manager.version:
            self._load_together(**what)

    def _load_together(self, *args: Any, **kwargs: Any) -> Any:
        """Load behind the first step: what recoveries go back to is to be this."""
        what = dict(inspect.signature(self._load).bind(*args, **kwargs).arguments)
        if self._hooks.is_in_step:
            raise ConfigError(
                "engine.load_checkpoint was called within a step: call it between "
                "engine.step() and the next forward"
            )
        if what.pop("custom_load_fn", None) is not None:
            raise ConfigError(
                "mnemosyne cannot protect engine.load_checkpoint with custom_load_fn "
                "behind the first step: a worker that is started anew in the middle "
                "of it could not be told the function"
            )
        what["load_dir"] = str(what["load_dir"])
        result: Any = None

        def load() -> None:
            nonlocal result
            result = self._load(**what)
            self._loaded(result)

        self._manager.load(load, what, self._hooks.catch_up)
        return result

    def _loaded(self, result: Any) -> None:
        self._state.loaded()
        if result[0] is not None:
            self._manager.checkpoint = str(Path(result[0]).parent)

    # --- save ---------------------------------------------------------------------

    def save(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        is_stop: bool = False,
    ) -> bool:
        """In place of engine.save_checkpoint; False if it was given up."""
        manager, engine = self._manager, self._engine
        options = (client_state or {}, save_latest, exclude_frozen_parameters)
        if engine.checkpoint_engine.is_decoupled():  # it writes when it likes
            return bool(self._save(save_dir, tag, *options))
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        version, number = self._last
        number = number + 1 if version == manager.version else 1
        self._last = (manager.version, number)
        torn = Path(save_dir, f"{tag}.saving")
        while is_stop or not manager.has_passed(self._last):
            try:
                self._write(torn, Path(save_dir, tag), *options)
            except Exception:
                if manager.is_setting_up or not manager.has_failed:
                    raise
                self._hooks.catch_up()
                shutil.rmtree(torn, ignore_errors=True)
                continue
            manager.saved = self._last
            manager.checkpoint = str(Path(save_dir, tag))
            return True
        if manager.saved >= self._last:
            return True
        if manager.is_speaker:
            print(
                f"mnemosyne: a worker was lost while checkpoint {tag} was due or "
                "saved: it is given up, and the older one stays",
                flush=True,
            )
        return False

    def stop(self) -> None:
        """Save the state in front of a step, and end."""
        self.save(self._stop_dir, is_stop=True)
        self._manager.stopped()
        raise SystemExit("the agent is gone")

    def _write(
        self, torn: Path, place: Path, client_state: Any, latest: bool, exclude: bool
    ) -> None:
        manager, engine = self._manager, self._engine
        is_per_node = engine.use_node_local_storage()
        is_keeper = (engine.local_rank if is_per_node else engine.global_rank) == 0
        if is_keeper:
            shutil.rmtree(torn, ignore_errors=True)  # of a job that was killed
        manager.phase("save")
        manager.mesh.hold_replay(True)
        try:
            self._save(str(torn.parent), torn.name, client_state, False, exclude)
        finally:
            manager.mesh.hold_replay(False)
        manager.phase("save-vote")
        manager.barrier()
        if is_keeper:
            _put(torn, place)
            if latest and engine.global_rank == 0:
                torn.write_text(place.name)
                os.replace(torn, place.with_name("latest"))
        # Who is past this knows that it is in place.
        manager.barrier()


def _put(torn: Path, place: Path) -> None:
    """Move a folder to where another one of the same name may be."""
    if place.exists():
        libc = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(torn), os.fsencode(place)
        swap = (_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
        if libc.renameat2(*swap) == 0:
            shutil.rmtree(torn)
            return
        shutil.rmtree(place)  # this file system cannot swap two folders
    torn.rename(place)


def _read(engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what engine.load_checkpoint would, and load nothing."""
    cls = type(engine)
    # Destroying an engine takes its optimizer apart.
    shadow_class = type(cls.__name__, (cls,), {"__del__": lambda self: None})
    shadow: Any = object.__new__(shadow_class)
    vars(shadow).update(vars(engine))
    inert = {
        "optimizer": _Inert(engine.optimizer),
        "lr_scheduler": None,
        "random_ltd_scheduler": None,
        "load_module_state_dict": lambda *args, **kwargs: None,
        "_load_zero_checkpoint": lambda *args, **kwargs: True,
    }
    vars(shadow).update(inert)
    return cls.load_checkpoint(shadow, *args, **kwargs)


class _Inert:
    """Stands in for an optimizer whose state is not to be touched."""

    def __init__(self, optimizer: Any) -> None:
        self.dp_process_group = getattr(optimizer, "dp_process_group", None)

        self.load_state_dict = self.refresh_fp32_params = self._do_nothing
        self.update_lp_params = self._do_nothing

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        pass
