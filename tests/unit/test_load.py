"""``engine.load_checkpoint`` behind the first step, apart from a job."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

from mnemosyne_plugin.adapters.deepspeed.checkpoint import Checkpoints  # noqa: E402
from mnemosyne_plugin.errors import ConfigError, FatalError, StateMismatch  # noqa: E402
from mnemosyne_plugin.recovery.commit import Report  # noqa: E402
from mnemosyne_plugin.recovery.manager import Manager  # noqa: E402


class Engine:
    """Notes what it is to load."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    def save_checkpoint(self, save_dir: str) -> None:
        pass

    def load_checkpoint(
        self, load_dir: str, tag: Any = None, custom_load_fn: Any = None
    ) -> Any:
        self.loaded.append((load_dir, tag))
        return f"{load_dir}/{tag}/file", {}


class FakeManager:
    """Has snapshots, and lets the load run."""

    has_snapshots = True
    is_setting_up_alone = False
    version = 7
    checkpoint = ""
    owed: Mapping[str, Any] = {}

    def load(self, call: Callable[[], None], what: Mapping[str, Any], _: Any) -> None:
        self.what = what
        call()


def checkpoints(engine: Engine, manager: FakeManager, **hooks: Any) -> Checkpoints:
    state: Any = SimpleNamespace(loaded=lambda: None)
    fake_hooks: Any = SimpleNamespace(**{"is_in_step": False, "catch_up": None} | hooks)
    wrapped = Checkpoints(engine, state, fake_hooks, manager, "")  # type: ignore[arg-type]
    wrapped.install()
    return wrapped


def test_a_load_is_told_in_words_that_a_newcomer_can_be_told() -> None:
    engine, manager = Engine(), FakeManager()
    checkpoints(engine, manager)
    assert engine.load_checkpoint(Path("saved"), "step4") == ("saved/step4/file", {})  # type: ignore[arg-type]
    assert manager.what == {"load_dir": "saved", "tag": "step4"}
    assert manager.checkpoint == "saved/step4"


@pytest.mark.parametrize(("version", "loads"), [(7, 1), (8, 0)])
def test_a_newcomer_loads_only_what_is_due_where_it_begins(
    version: int, loads: int
) -> None:
    engine, manager = Engine(), FakeManager()
    manager.owed = {"load_dir": "saved", "tag": "step4", "version": version}
    checkpoints(engine, manager).join()
    assert engine.loaded == [("saved", "step4")] * loads
    assert manager.owed["version"] == version  # the manager's to change


def test_what_cannot_be_made_again_is_refused() -> None:
    engine, manager = Engine(), FakeManager()
    checkpoints(engine, manager)
    with pytest.raises(ConfigError, match="custom_load_fn"):
        engine.load_checkpoint("saved", custom_load_fn=print)
    engine = Engine()
    checkpoints(engine, manager, is_in_step=True)
    with pytest.raises(ConfigError, match="within a step"):
        engine.load_checkpoint("saved")
    assert engine.loaded == []


def test_a_report_tells_what_is_loaded() -> None:
    what = {"load_dir": "saved", "tag": None, "version": 7}
    report = Report(rank=1, newcomer=False, version=7, has_voted=False, loading=what)
    assert Report.from_json(report.to_json()) == report


def manager_among(votes: list[int]) -> Manager:
    """Return a manager at version 7 whose peers vote with these numbers."""
    manager = object.__new__(Manager)

    def minimum(*values: int) -> list[int]:
        others = [(vote, -vote, 0) for vote in votes]
        return [min(column) for column in zip(values, *others, strict=True)]

    fields: dict[str, Any] = {
        "version": 7,
        "rank": 1,
        "owed": {"load_dir": "saved", "version": 7},
        "_control": SimpleNamespace(minimum=minimum),
        "_protection": SimpleNamespace(),
        "_device": None,
        "mesh": SimpleNamespace(failure=lambda: None),
    }
    vars(manager).update(fields)
    return manager


def test_a_load_and_a_step_at_one_time_are_a_mismatch_on_either_side() -> None:
    loads, steps = -1 - 7, 7
    manager_among([loads, loads])._agree_to_load()
    with pytest.raises(StateMismatch, match="load a checkpoint"):
        manager_among([loads, steps])._agree_to_load()
    with pytest.raises(StateMismatch, match="load a checkpoint"):
        manager_among([steps, loads])._agree(steps, is_asked=False)
    with pytest.raises(StateMismatch, match="different steps"):
        manager_among([steps, 8])._agree(steps, is_asked=False)


def test_a_newcomer_whose_script_passes_over_a_load_ends_the_job() -> None:
    with pytest.raises(FatalError, match="saved"):
        manager_among([])._begin()
