"""Megatron's asynchronous checkpoints apart from a job: its queue is a fake."""

import multiprocessing
import queue
import signal
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from mnemosyne_plugin.adapters.megatron.background import Background

RESULTS = "megatron.core.dist_checkpointing.strategies.filesystem_async"


class Caller:
    """Has one process, which writes until it is ended."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.process: Any = context.Process(target=signal.pause)
        self.process.start()

    def close(self, abort: bool) -> None:
        assert abort
        if self.process is not None:
            self.process.kill()
            self.process = None


class Calls:
    def __init__(self) -> None:
        self.async_calls = deque([SimpleNamespace(async_caller=Caller())])
        self.call_idx = 3
        self.is_closed = False

    def close(self, abort: bool) -> None:
        self.is_closed = abort


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Background:
    calls, results = Calls(), queue.Queue[str]()
    results.put("of the checkpoint that is given up")
    started: list[tuple[int, str]] = []
    module = SimpleNamespace(
        _async_calls_queue=calls,
        is_empty_async_queue=lambda: not calls.async_calls,
        init_persistent_async_worker=lambda *args: started.append(args),
        started=started,
    )
    monkeypatch.setitem(sys.modules, "megatron.training.async_utils", module)  # type: ignore[arg-type]
    monkeypatch.setitem(
        sys.modules,
        RESULTS,
        SimpleNamespace(_results_queue=results),  # type: ignore[arg-type]
    )
    manager: Any = SimpleNamespace(mesh=SimpleNamespace(epoch=1), rank=2)
    return Background(manager, SimpleNamespace(use_persistent_ckpt_worker=True))


def test_giving_up_ends_the_writer_and_counts_as_a_newcomer_does(
    background: Background,
) -> None:
    module: Any = sys.modules["megatron.training.async_utils"]
    calls = module._async_calls_queue
    writer = calls.async_calls[0].async_caller.process
    assert background.is_writing
    assert not background.has_lost_its_writer
    background.give_up()
    assert writer.exitcode is not None
    assert not background.is_writing
    assert calls.call_idx == -1
    assert calls.is_closed
    assert module.started == [(2, "forkserver")]
    assert sys.modules[RESULTS]._results_queue.empty()


def test_a_writer_that_died_alone_is_noticed(background: Background) -> None:
    module: Any = sys.modules["megatron.training.async_utils"]
    writer = module._async_calls_queue.async_calls[0].async_caller.process
    writer.kill()
    writer.join()
    assert background.has_lost_its_writer
    background.give_up()


def test_plans_of_earlier_saves_are_dropped_behind_a_recovery(
    background: Background,
) -> None:
    context = {"save_strategy": "plans", "load_strategy": "plans", "other": 1}
    background.begin(lambda: None, context)
    assert len(context) == 3
    background._manager.mesh.epoch = 2  # type: ignore[misc]
    assert background.is_outdated()
    assert not background.is_outdated()
    background.begin(lambda: None, context)
    assert context == {"other": 1}
    background.give_up()
