"""An abort on a device that never ends."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnemosyne_plugin.errors import OutOfDeviceMemory
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.recovery import device_groups
from mnemosyne_plugin.recovery.device_groups import DeviceGroups
from mnemosyne_plugin.recovery.manager import Manager


class Group:
    """Something is in flight in it, and its abort waits for ``may_end``."""

    key = 1
    global_ranks = (0,)

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.is_aborting = threading.Event()

    def standing(self) -> list[Any]:
        return [1, False, 3, [], []]

    def look(self) -> None:
        pass

    def abort_inner_if_busy(self) -> None:
        self.is_aborting.set()
        self.may_end.wait()


def manager_of(groups: list[Group], folder: Path, given_up: list[bool]) -> DeviceGroups:
    devices: Any = SimpleNamespace(
        connect_s=0.0, type="cpu", used=lambda: None, wait=lambda device=None: None
    )
    return DeviceGroups(
        devices,
        SimpleNamespace(),  # type: ignore[arg-type]
        rank=2,
        events=EventLog(str(folder), "test"),
        find=lambda: groups,  # type: ignore[arg-type, return-value]
        give_up=lambda: given_up.append(True),
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistBackendError("NCCL: Cuda failure 2 'out of memory'"),
    ],
)
def test_out_of_memory_in_a_repair_is_told_as_what_it_is(
    tmp_path: Path, error: Exception
) -> None:
    def connect(*_: Any) -> None:
        raise error

    fenced = list[str]()
    groups = manager_of([], tmp_path, [])
    groups.devices = SimpleNamespace(connect=connect, current=lambda: "device")  # type: ignore[assignment]
    groups._mesh = SimpleNamespace(failure=lambda: None, fence=fenced.append)  # type: ignore[assignment]
    group: Any = SimpleNamespace(abort_inner=lambda: None)
    manager: Any = object.__new__(Manager)
    manager._protection, manager.rank, manager.version = object(), 2, 7
    manager._recover_once = lambda _: groups._connect([(group, True)])
    with pytest.raises(OutOfDeviceMemory, match="rank 2 ran out of memory .* step 7"):
        manager._recover()
    assert len(fenced) == 1  # nobody waits for this rank


def test_aborts_run_side_by_side_and_are_given_time(tmp_path: Path) -> None:
    groups, given_up = [Group(), Group()], list[bool]()
    manager = manager_of(groups, tmp_path, given_up)
    assert manager.watch() == device_groups._LOOK_S
    manager.release()
    assert all(group.is_aborting.wait(10) for group in groups)
    assert 0 < manager.watch() <= device_groups._LOOK_S and not given_up
    for group in groups:
        group.may_end.set()
    for thread in manager._aborts:
        thread.join()
    assert manager.watch() == device_groups._LOOK_S and not given_up


def test_a_process_whose_abort_never_ends_gives_itself_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_groups, "_ABORT_S", 0.0)
    groups, given_up = [Group()], list[bool]()
    manager = manager_of(groups, tmp_path, given_up)
    manager.release()
    manager.watch()
    assert given_up == [True]
    assert "device_hangs" in next(tmp_path.glob("events/*")).read_text()
    groups[0].may_end.set()


def test_a_repair_aborts_what_nobody_has_aborted(tmp_path: Path) -> None:
    # The reader's thread found the failure repaired already.
    group, given_up = Group(), list[bool]()
    manager = manager_of([group], tmp_path, given_up)
    manager._abort_s = 30.0
    manager.devices.wait = lambda device=None: group.is_aborting.wait()  # type: ignore
    control: Any = SimpleNamespace(gather=lambda blob: [])
    group.may_end.set()
    with pytest.raises(IndexError):  # no rank has told of its groups
        manager.settle(control)
    assert group.is_aborting.is_set() and not given_up


def test_a_process_whose_device_never_answers_gives_itself_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_groups, "_ABORT_S", 0.0)
    answers, given_up = threading.Event(), list[bool]()
    manager = manager_of([], tmp_path, given_up)
    manager.devices.wait = lambda device=None: answers.wait()  # type: ignore
    manager._device = torch.device("cpu")
    manager.release()
    manager.watch()
    assert given_up == [True]
    answers.set()
