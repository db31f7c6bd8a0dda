"""What Megatron-LM does between its steps: checkpoints and evaluation.

If a worker is lost in it, it is given up: newcomers come back in front of the next
step. A checkpoint that is torn by that stays unused, for Megatron names the newest one
in a file only when all of it is written.
"""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from mnemosyne_plugin.adapters.megatron.background import Background
from mnemosyne_plugin.adapters.megatron.evaluation import Evaluation
from mnemosyne_plugin.adapters.megatron.loop import Loop
from mnemosyne_plugin.adapters.megatron.state import MegatronState
from mnemosyne_plugin.adapters.whole_step import WholeStep
from mnemosyne_plugin.recovery.manager import Manager

_TRACKER = "latest_checkpointed_iteration.txt"
_ERRORS = (Exception, CheckpointException)  # which is a BaseException


class Saves:
    """Wraps the functions of ``megatron.training.training`` that do it."""

    def __init__(
        self,
        module: Any,
        manager: Manager,
        state: MegatronState,
        loop: Loop,
        whole: WholeStep,
    ) -> None:
        self._module = module
        self._manager = manager
        self._state = state
        self._loop = loop
        self._whole = whole
        self._args = module.get_args()
        self._background = Background(manager, self._args)
        self._may_give_up = False
        self._newest = _read_tracker(self._args.load)
        if self._newest is not None:
            manager.checkpoint = str(Path(self._args.load, _folder(self._newest)))

    def install(self) -> None:
        """Put the wrappers in place."""
        module = self._module
        self._save = module.save_checkpoint
        self._signature = inspect.signature(self._save)
        module.save_checkpoint = self.save
        module.save_checkpoint_and_time = self._given_up(
            module.save_checkpoint_and_time, "a checkpoint"
        )
        module.evaluate_and_print_results = Evaluation(
            module.evaluate_and_print_results, self._loop
        ).wrapped(lambda call: self._given_up(call, "an evaluation"))
        if self._args.async_save:
            self._background.install()
            self._finish = module.maybe_finalize_async_save
            self._finish_together = self._given_up(self._ask, "a checkpoint")
            module.maybe_finalize_async_save = self.finish
        if self._args.save:
            self._manager.offer_stop(self.stop)
        else:
            self._manager.no_checkpoint += ", for --save is not given"

    def save(self, iteration: int, *args: Any, **kwargs: Any) -> None:
        """In place of save_checkpoint."""
        if self._may_give_up:
            self._write(iteration, *args, **kwargs)
        else:  # behind the last step: newcomers come here as well
            self._loop.count_samples()
            self._until_written(lambda: self._write(iteration, *args, **kwargs))

    def finish(self, blocking: bool = False, terminate: bool = False) -> None:
        """In place of maybe_finalize_async_save."""
        self._give_up_outdated()
        if self._background.is_writing:
            if self._background.has_lost_its_writer:
                # As if a link had broken: that is how others learn of it.
                self._manager.mesh.fence("what writes a checkpoint has ended")
            if self._finish_together(blocking, terminate):
                return
            self._background.give_up()
        self._finish(blocking, terminate)

    def _ask(self, *args: Any) -> None:
        self._manager.phase("save-ask")
        self._finish(*args)

    def stop(self) -> None:
        """Save the state in front of a step, and end."""
        state, loop = self._state, self._loop
        self._until_written(
            lambda: self._write(
                loop.iteration,
                list(state.chunks),
                state.optimizer,
                state.scheduler,
                loop.operations,
            )
        )
        self._manager.stopped()
        raise SystemExit("the agent is gone")

    def _until_written(self, write: Callable[[], None]) -> None:
        manager = self._manager
        # One rank may know that it is written where another has seen a failure, and
        # newcomers come here when all others have it behind them.
        while manager.saved[0] < manager.version:
            manager.mesh.absorb(False)
            put_back = self._loop.modes()
            try:
                write()
                if self._background.is_writing:
                    manager.mesh.hold_replay(True)
                    self._finish(blocking=True)
            except _ERRORS:
                if manager.is_setting_up or not manager.has_failed:
                    raise
                put_back()
                self._mend_tracker()
                self._background.give_up()
                self._whole.catch_up()
            finally:
                manager.mesh.hold_replay(False)
                manager.mesh.absorb(True)

    def _write(self, iteration: int, *args: Any, **kwargs: Any) -> None:
        manager = self._manager
        manager.phase("save")
        self._give_up_outdated()
        given = self._signature.bind(iteration, *args, **kwargs).arguments
        written: Callable[[], None] = manager.barrier
        if not given.get("non_persistent_ckpt"):  # those have a folder of their own
            written = functools.partial(self._written, iteration, manager.version)
        self._background.begin(written, given.get("checkpointing_context"))
        manager.mesh.hold_replay(True)  # a newcomer may still be in its set-up
        try:
            self._save(iteration, *args, **kwargs)
        finally:
            manager.mesh.hold_replay(False)
        if not self._args.async_save:
            written()

    def _written(self, iteration: int, version: int) -> None:
        """The checkpoint that was made at ``version`` is whole."""
        manager = self._manager
        manager.phase("save-vote")
        manager.barrier()
        self._newest = iteration
        manager.saved = (version, 1)
        manager.checkpoint = str(Path(self._args.save, _folder(iteration)))

    def _give_up_outdated(self) -> None:
        """Behind a recovery: what was begun in front of it is not finished."""
        if self._background.is_outdated():
            if self._background.is_writing:
                self._say("a checkpoint")
            self._background.give_up()

    def _given_up(self, function: Callable[..., Any], what: str) -> Callable[..., bool]:
        """Return ``function``, which gives up where a worker is lost: False."""
        manager = self._manager

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> bool:
            if manager.version <= manager.furthest_of_all or manager.has_failed:
                return self._say(what)
            if manager.is_setting_up:
                function(*args, **kwargs)
                return True
            put_back = self._loop.modes()
            manager.mesh.absorb(False)
            self._may_give_up = True
            try:
                function(*args, **kwargs)
                return True
            except _ERRORS:
                if not manager.has_failed:
                    raise
                put_back()
                self._mend_tracker()
                return self._say(what)
            finally:
                self._may_give_up = False
                manager.mesh.absorb(True)

        return wrapper

    def _say(self, what: str) -> bool:
        if self._manager.is_speaker:
            print(
                f"mnemosyne: a worker was lost while {what} was due or under way: it "
                "is given up",
                flush=True,
            )
        return False

    def _mend_tracker(self) -> None:
        """Name the newest whole checkpoint, if a death has torn the file that does."""
        if not self._manager.is_speaker or self._newest is None or not self._args.save:
            return
        tracker = Path(self._args.save, _TRACKER)
        if tracker.exists() and _read_tracker(self._args.save) is None:
            whole = tracker.with_suffix(".whole")
            whole.write_text(str(self._newest))
            os.replace(whole, tracker)


def _folder(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _read_tracker(folder: str | None) -> int | None:
    """Return the iteration of the newest checkpoint; None if there is no number."""
    try:
        return int(Path(folder or "", _TRACKER).read_text().strip())
    except (OSError, ValueError):
        return None
