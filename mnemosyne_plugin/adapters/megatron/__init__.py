"""Megatron: protects a loop that is built on megatron.core.

    session = mnemosyne_plugin.megatron.attach(chunks, optimizer, scheduler)
    for step in range(session.step, num_steps):
        losses = session.run(train_step, data_iterator)

``train_step`` does everything of one step: it zeroes the gradient buffers, runs
Megatron's forward-backward function, and calls ``optimizer.step`` once. If a worker is
lost in it, it is run again on repaired groups, with the same micro-batches.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mnemosyne_plugin import recovery
from mnemosyne_plugin.config import Config
from mnemosyne_plugin.errors import ConfigError

if TYPE_CHECKING:
    from mnemosyne_plugin.adapters.megatron.state import MegatronState
    from mnemosyne_plugin.adapters.whole_step import WholeStep
    from mnemosyne_plugin.recovery.manager import Manager


class Session:
    """Runs steps of a protected training loop. Made by ``attach``."""

    def __init__(self, manager: "Manager", whole: "WholeStep") -> None:
        self._manager = manager
        self._whole = whole

    @property
    def step(self) -> int:
        """Number of the next step; not 0 where this worker replaces a lost one."""
        return self._manager.version

    def run(self, train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one step and return what ``train_step`` returned.

        ``train_step(*args, **kwargs)`` may be called more than once, also in a later
        ``run``: each time with the same random state, buffers and micro-batches. For
        that, arguments that are iterators, or lists of iterators, are passed as
        iterators that remember what they gave; all else must be as it was.
        """
        numbers = itertools.count()

        def taking(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(taking(item) for item in value)
            if not isinstance(value, Iterator):
                return value
            return Taking(self._whole, next(numbers), value)

        given = [taking(argument) for argument in args]
        return self._whole.run(lambda: train_step(*given, **kwargs))


class Taking:
    """An iterator that gives a redo what it gave before."""

    def __init__(self, whole: "WholeStep", number: int, iterator: Any) -> None:
        """number: tells it from the other ones of the step."""
        self._whole = whole
        self._number = number
        self._iterator = iterator

    def __iter__(self) -> "Taking":
        return self

    def __next__(self) -> Any:
        return self._whole.take(self._number, lambda: next(self._iterator))


def attach(
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any = None,
    *,
    config: Config | None = None,
) -> Session:
    """Protect a training loop: call it on every rank, right before the loop.

    chunks: the DistributedDataParallel modules of megatron.core that this rank has; a
    list, also if it is one. optimizer: what ``get_megatron_optimizer`` returned.
    scheduler: OptimizerParamScheduler, or anything with ``state_dict`` and
    ``load_state_dict``. config: the choices; the default protects by snapshots.

    On a newcomer it returns with the job's state in place. Raises ConfigError if this
    process was not started by `mnemosyne run`, or some state is of a kind that is not
    protected yet.
    """
    manager = current_manager(
        "attach() protects workers that `mnemosyne run` started; start this script by "
        "`mnemosyne run` in place of torchrun"
    )
    config = config or Config()
    from mnemosyne_plugin.adapters.megatron.state import MegatronState

    state = MegatronState(chunks, optimizer, scheduler)
    return Session(manager, protect(manager, state, config))


def current_manager(why_not: str) -> "Manager":
    """Return this process's manager; ConfigError, saying ``why_not``, without one."""
    manager = recovery.current()
    if manager is None:
        raise ConfigError(why_not)
    return manager


def protect(
    manager: "Manager",
    state: "MegatronState",
    config: Config,
    *,
    has_loader: bool = False,
) -> "WholeStep":
    """Have ``state`` kept by buddies, and say so.

    has_loader: the trainer's own loader is at its place by itself.
    """
    from mnemosyne_plugin.adapters import lost_device
    from mnemosyne_plugin.adapters.megatron import devices, nvidia, phases
    from mnemosyne_plugin.adapters.redundancy import Redundancy
    from mnemosyne_plugin.adapters.whole_step import WholeStep
    from mnemosyne_plugin.data import positions
    from mnemosyne_plugin.state.torch_state import Frozen

    manager.configure_device_proxy(config.device_proxy)
    redundancy = Redundancy.of(config, True, manager.nodes)
    is_to_speak = manager.rank == 0 and not manager.is_setting_up_alone
    if is_to_speak:
        print(nvidia.line(state.optimizers), flush=True)
        print(
            redundancy.start_line(has_loader=has_loader or bool(positions())),
            flush=True,
        )
        lost_device.tell(manager)
    phases.install(manager, state)
    devices.prepare(manager, state)
    whole = WholeStep(manager, state)
    for part in state.optimizers:
        part.optimizer.register_step_pre_hook(whole.commit)
    manager.attach(
        Frozen({}, state.rewind),
        positions(),
        shard=state,
        redo=whole.catch_up,
        num_buddies=config.buddies,
        snapshot_every=config.snapshot_every,
        on_footprint=redundancy.tell if is_to_speak else None,
        may_restart=config.on_state_lost == "restart",
    )
    return whole
