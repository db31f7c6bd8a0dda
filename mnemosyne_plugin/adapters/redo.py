"""What adapters share: the commit of a step, and its unwinding."""

import gc
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from mnemosyne_plugin.recovery.commit import Outcome
from mnemosyne_plugin.recovery.manager import Manager


class Redo(BaseException):
    """Unwinds a doomed step; not an Exception, so that trainers let it pass."""


class Made(BaseException):
    """Unwinds a mutation that the others have made, and this rank has."""


def free_unwound_step() -> None:
    """Free what the step that is being unwound has on a device, before it is redone.

    Its activations lie in the frames of exceptions that are still being handled, and
    in cycles; a device may have no room for them twice.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    error, seen = sys.exc_info()[1], set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # One of a generator may go on, and clearing it would end that.
            if not frame.f_code.co_flags & inspect.CO_GENERATOR:
                with suppress(RuntimeError):  # it is running
                    frame.clear()
        error = error.__context__
    gc.collect()


class Commit:
    """The commit of one step after the other."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """Whether the step under way is committed: its mutation has begun."""
        return self._is_done

    @contextmanager
    def due(self) -> Iterator[None]:
        """Commit in the block at the latest; raises Redo if the step is doomed."""
        self._is_done = False
        with self.unwound():
            yield
            self()  # the mutation was skipped, because a gradient overflowed

    def __call__(self, *_: Any) -> None:
        """Vote, if this step has not: a hook in front of an optimizer's mutation.

        ZeRO steps its torch optimizer once for each group of parameters.
        """
        if self._is_done:
            return
        if self._manager.commit() is Outcome.REDO:
            raise Redo
        self._is_done = True
        if self._manager.is_ahead:
            raise Made

    @contextmanager
    def unwound(self) -> Iterator[None]:
        """Turn an error into Redo where a failure may be what has caused it.

        What a failed collective leaves is no data, and the trainer may find that out.
        """
        try:
            yield
        except Exception:
            if not self._manager.is_doomed:
                raise
            raise Redo from None
