"""DeepSpeed's data loaders: their passes, and which of them have a position unasked."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from mnemosyne_plugin import recovery
from mnemosyne_plugin.data import resumable
from mnemosyne_plugin.data.loops import Resumable
from mnemosyne_plugin.data.sources import TorchSource, source_of, workers
from mnemosyne_plugin.errors import ConfigError

_repeated: "weakref.WeakSet[Resumable]" = weakref.WeakSet()
_is_read_by_script = False


def start_over() -> None:
    """In a newcomer whose script loads a checkpoint, and so skips batches itself.

    RepeatingLoaders begin at the first batch. It skips up to ``engine.global_steps``.
    """
    global _is_read_by_script
    _is_read_by_script = True
    for loader in _repeated:
        loader.start_over()


def hook_loaders(module: Any) -> None:
    """Let ``deepspeed.runtime.dataloader`` and us know each other's loaders.

    RepeatingLoader is for loops over steps, which start where the job is. In a worker
    of `mnemosyne run` it gives a position to a loader that DeepSpeed has made. Not to
    one of the script: a script that resumes by itself reads that up to where it was.
    """
    source_of.register(module.DeepSpeedDataLoader, _DeepSpeedSource)
    initialize = module.RepeatingLoader.__init__
    if hasattr(initialize, "__wrapped__"):
        return  # done already: each kind of engine has its hook

    @functools.wraps(initialize)
    def wrapper(repeating: Any, loader: Any) -> None:
        is_known = isinstance(loader, module.DeepSpeedDataLoader)
        is_ours = is_known and recovery.current() is not None
        if is_ours or isinstance(loader, Resumable):
            loader = resumable(loader, catch_up=False)
        if isinstance(loader, Resumable):
            _repeated.add(loader)
            if _is_read_by_script:
                loader.start_over()
        initialize(repeating, loader)

    module.RepeatingLoader.__init__ = wrapper


class _DeepSpeedSource(TorchSource):
    """Makes a torch DataLoader for each pass, as DeepSpeed's loader does."""

    def __init__(self, loader: Any) -> None:
        if loader.curriculum_learning_enabled:
            raise ConfigError(
                "mnemosyne cannot protect a loader with curriculum learning yet; set "
                "mnemosyne.enabled to false to run unprotected"
            )
        super().__init__(loader)

    @property
    def description(self) -> str:
        loader: Any = self.loader
        return f"DeepSpeed's loader, {workers(loader.num_local_io_workers)}"

    @property
    def is_stream(self) -> bool:
        return False  # it is an iterator, but one that `iter` starts anew

    def _begin(self, cut: Any) -> Iterator[Any]:
        loader: Any = self.loader
        collate = {} if loader.collate_fn is None else {"collate_fn": loader.collate_fn}
        loader.dataloader = DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            pin_memory=loader.pin_memory,
            sampler=loader.data_sampler,
            num_workers=loader.num_local_io_workers,
            drop_last=loader.dataloader_drop_last,
            **collate,
        )
        source = TorchSource(loader.dataloader)
        loader.data = source._begin(cut)
        # By its own `next`, which starts its timer.
        return iter(functools.partial(next, loader), object())

    def _samplers(self) -> list[Any]:
        loader: Any = self.loader
        return [loader.data_sampler]
