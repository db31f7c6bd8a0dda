"""Megatron-LM's ``pretrain``: protected when ``--mnemosyne`` is given.

``setup_model_and_optimizer`` attaches, ``train_step`` is made redoable. Between two
steps Megatron communicates as well: timers, evaluation, checkpoints. A worker that is
lost there spoils no state: the collectives return at once, and the next step begins
with the recovery. What others have left behind by then, a rank does without them.
"""

import functools
from typing import Any

from mnemosyne_plugin.adapters.megatron import Taking, current_manager, protect
from mnemosyne_plugin.adapters.megatron.arguments import config_of
from mnemosyne_plugin.adapters.megatron.loop import Loop
from mnemosyne_plugin.adapters.megatron.saves import Saves
from mnemosyne_plugin.adapters.megatron.state import MegatronState
from mnemosyne_plugin.adapters.whole_step import WholeStep
from mnemosyne_plugin.config import Config
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.manager import Manager

_TARGETS = (
    *("setup_model_and_optimizer", "train_step", "load_checkpoint"),
    *("save_checkpoint", "save_checkpoint_and_time", "evaluate_and_print_results"),
    *("get_args", "get_timers", "num_floating_point_operations", "train"),
)


def hook(module: Any) -> None:
    """Have a run protected if its command line asks for it.

    Called right after ``megatron.training.training`` was loaded. A second call does
    nothing: a source tree may be patched as well. Raises ConfigError if it is not as
    in Megatron-LM 0.16 to 0.19.
    """
    if hasattr(module, "_has_mnemosyne"):
        return
    module._has_mnemosyne = True
    for name in _TARGETS:
        if not callable(getattr(module, name, None)):
            raise ConfigError(
                f"megatron.training.training has no {name}(); want 0.16 to 0.19"
            )
    set_up, load = module.setup_model_and_optimizer, module.load_checkpoint

    @functools.wraps(set_up)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        config = config_of(module.get_args())
        if config is None:
            return set_up(*args, **kwargs)
        manager = current_manager("--mnemosyne needs `mnemosyne run`")
        manager.refuse_device_proxy("Megatron-LM's pretrain")

        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            if manager.is_setting_up_alone:
                return 0, 0  # the state of the job is newer
            # A newcomer does none of its collectives.
            manager.mesh.hold_replay(True)
            try:
                return load(*args, **kwargs)
            finally:
                manager.mesh.hold_replay(False)

        module.load_checkpoint = load_checkpoint
        try:
            model, optimizer, scheduler = set_up(*args, **kwargs)
        finally:
            module.load_checkpoint = load
        _Training(module, manager, model, optimizer, scheduler).install(config)
        return model, optimizer, scheduler

    module.setup_model_and_optimizer = setup_model_and_optimizer


class _Training:
    """Wraps what the training loop of this process calls."""

    def __init__(
        self,
        module: Any,
        manager: Manager,
        model: Any,
        optimizer: Any,
        scheduler: Any,
    ) -> None:
        if optimizer is None:
            raise ConfigError(
                "--mnemosyne protects training, and --skip-train is given"
            )
        self._module = module
        self._manager = manager
        self._loop = Loop(module, model)
        self._state = MegatronState(model, optimizer, scheduler, self._loop)
        self._whole: WholeStep
        self._is_apart = False

    def install(self, config: Config) -> None:
        """Attach, and put the wrappers in place."""
        module, manager = self._module, self._manager
        if manager.rank == 0 and not manager.is_setting_up_alone:
            print("mnemosyne: data position by consumed samples", flush=True)
        is_newcomer = manager.is_setting_up_alone
        self._whole = protect(manager, self._state, config, has_loader=True)
        if is_newcomer:
            self._loop.enter()
            print(
                f"mnemosyne: rank {manager.rank} takes over at iteration "
                f"{self._loop.iteration}",
                flush=True,
            )
        self._train, self._train_step = module.train, module.train_step
        module.train, module.train_step = self.train, self.train_step
        Saves(module, manager, self._state, self._loop, self._whole).install()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """In place of train: when a newcomer comes, the others may have left theirs."""
        manager, loop = self._manager, self._loop
        # In front of the job's first step nobody has asked whether to exit.
        is_to_exit = manager.version > 0 and loop.is_to_exit
        if not manager.is_setting_up_alone or not (is_to_exit or loop.is_over):
            return self._train(*args, **kwargs)
        manager.end_setup()
        manager.mesh.start_replay(b"")  # what follows is behind the others
        if is_to_exit:
            raise SystemExit(0)
        return loop.iteration, loop.operations

    def train_step(
        self, forward_step_func: Any, data_iterator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of train_step: what it counts and where it is are the loop's."""
        self._come_back()
        self._loop.begin()
        self._take_from(data_iterator)

        def make() -> Any:
            with self._loop.in_step():
                result = self._train_step(
                    forward_step_func, data_iterator, *args, **kwargs
                )
            # (losses, whether the gradients overflowed, ...)
            self._loop.advance(has_mutated=not result[1])
            return result

        result = self._whole.run(make)
        self._leave()
        return result

    def _leave(self) -> None:
        """The loop may communicate now, until the next step."""
        if self._manager.version <= self._manager.furthest_of_all:
            self._is_apart = True  # the others have that behind them
            self._manager.mesh.start_replay(b"")
        else:
            self._manager.mesh.absorb(True)

    def _come_back(self) -> None:
        if self._is_apart:
            self._is_apart = False
            self._manager.mesh.stop_replay()
            self._state.forget_gathers()

    def _take_from(self, data_iterator: Any) -> None:
        """Have the iterators give a redo what they gave before."""
        is_list = isinstance(data_iterator, list | tuple)
        for number, each in enumerate(data_iterator if is_list else [data_iterator]):
            if each is None or isinstance(each.iterable, Taking):
                continue
            each.iterable = Taking(self._whole, number, each.iterable)
            self._loop.iterators.append(each)
