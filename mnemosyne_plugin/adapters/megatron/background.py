"""Megatron-LM's asynchronous checkpoints: other processes write them during steps.

Between two steps all ranks ask each other whether theirs is written, and together name
it the newest if so. A newcomer has begun none, and what wrote for the dead worker is
dead: so with a recovery all ranks give up what is not written yet.
"""

import importlib
import queue
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.manager import Manager

# Where writers leave what the checkpoint's metadata say of their files.
_RESULTS = (
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async",
)


class Background:
    """What this rank has begun to write, also by a save that waits for it."""

    def __init__(self, manager: Manager, args: Any) -> None:
        """args: Megatron's."""
        self._manager = manager
        self._is_persistent = getattr(args, "use_persistent_ckpt_worker", False)
        self._async = importlib.import_module("megatron.training.async_utils")
        self._epoch = self._context_epoch = manager.mesh.epoch
        self._on_written: Callable[[], None]

    def install(self) -> None:
        """Have each that is scheduled from here on tell when it is written."""
        module = "megatron.training.checkpointing"
        checkpointing: Any = importlib.import_module(module)
        schedule = getattr(checkpointing, "schedule_async_save", None)
        if schedule is None:
            raise ConfigError(f"{module} has no schedule_async_save(); cannot protect")

        def schedule_async_save(request: Any) -> None:
            request.finalize_fns.insert(0, lambda: self._manager.phase("save-end"))
            request.add_finalize_fn(self._on_written)
            schedule(request)

        checkpointing.schedule_async_save = schedule_async_save

    @property
    def is_writing(self) -> bool:
        """Whether all ranks have something to finish."""
        return not self._async.is_empty_async_queue()

    @property
    def has_lost_its_writer(self) -> bool:
        """Whether that ended by itself, as the kernel does it without memory.

        Megatron would wait for it to the end of the job, and there for ever.
        """
        calls = self._async._async_calls_queue.async_calls
        writers = [call.async_caller.process for call in calls]
        return self._is_persistent and not all(
            writer.is_alive() for writer in writers if writer is not None
        )

    def begin(
        self,
        on_written: Callable[[], None],
        context: MutableMapping[str, Any] | None,
    ) -> None:
        """In front of a save. on_written: called on all ranks when it is whole.

        context: Megatron's checkpointing_context. Plans of earlier saves that it keeps
        spare collectives, but a newcomer has none.
        """
        self._on_written = on_written
        if self._context_epoch != self._manager.mesh.epoch:
            self._context_epoch = self._manager.mesh.epoch
            for name in ("save_strategy", "load_strategy"):
                (context or {}).pop(name, None)

    def is_outdated(self) -> bool:
        """Whether a recovery has come since this was last asked."""
        before, self._epoch = self._epoch, self._manager.mesh.epoch
        return before != self._epoch

    def give_up(self) -> None:
        """End this rank's writers, and forget what they have done."""
        calls = self._async._async_calls_queue
        if calls is not None:
            is_writing = self.is_writing
            for call in calls.async_calls:
                writer = call.async_caller.process
                call.async_caller.close(abort=True)
                if writer is not None:
                    writer.join()
            calls.async_calls.clear()
            calls.call_idx = -1  # a newcomer counts from there
            if is_writing and self._is_persistent:
                calls.close(abort=True)
                # Here, for the next save would wait until it has started.
                self._async.init_persistent_async_worker(
                    self._manager.rank, "forkserver"
                )
        for name in _RESULTS:
            results = getattr(sys.modules.get(name), "_results_queue", None)
            if results is not None:
                _empty(results)


def _empty(results: Any) -> None:
    while True:
        try:
            results.get_nowait()
        except queue.Empty:
            return
