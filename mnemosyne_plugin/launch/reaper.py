"""Ending processes, and whole groups of them."""

import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_TRACKER = b"multiprocessing.resource_tracker"
_TRACKER_TIMEOUT_S = 2.0  # to remove what a killed process has left; milliseconds
_MAX_SWEEPS = 10  # over /proc: what is killed in one may have forked in front of it


def kill_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a worker and to what it started."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # not a group leader yet, or gone
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_orphans(pid: int) -> None:
    """End what a worker has started, who has ended itself.

    All but multiprocessing's resource tracker, if it has one: that removes the named
    semaphores of the others when they are gone, and ends by itself.
    """
    if not any(_is_tracker(child) for child in _group(pid, _children())):
        kill_group(pid, signal.SIGKILL)
        return
    for _ in range(_MAX_SWEEPS):
        others = [each for each in _group(pid, _all()) if not _is_tracker(each)]
        if not others:
            return
        for each in others:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)


def kill_children(timeout_s: float) -> None:
    """End every child that this process still has, and theirs as they come to us."""
    deadline = time.monotonic() + timeout_s
    patience = min(deadline, time.monotonic() + _TRACKER_TIMEOUT_S)
    while (pids := _children()) and time.monotonic() < deadline:
        # Trackers last: they end when no other process is left that they clean up for.
        for pid in sorted(pids, key=_is_tracker):
            if _is_tracker(pid) and _reap(pid, patience):
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid, deadline)


def _is_tracker(pid: int) -> bool:
    try:
        return _TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _group(number: int, pids: Iterable[int]) -> list[int]:
    """Return those in a process group that have not ended."""
    members = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            # What is behind the name of the program: state, parent, group, ...
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if words[0] not in "ZX" and int(words[2]) == number:
                members.append(pid)
    return members


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _children() -> list[int]:
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            pids += map(int, (task / "children").read_text().split())
    return pids


def _reap(pid: int, deadline: float) -> bool:
    """Wait for a child's end; return whether it is gone."""
    try:
        fd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        finally:
            os.close(fd)
    except (ChildProcessError, ProcessLookupError):
        return True
