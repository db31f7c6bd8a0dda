"""Ending processes, and whole groups of them."""

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path


def kill_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a worker and to what it started."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # not a group leader yet, or gone
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_children(timeout_s: float) -> None:
    """End every child that this process still has, and theirs as they come to us."""
    deadline = time.monotonic() + timeout_s
    while (pids := _children()) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid, deadline)


def _children() -> list[int]:
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            pids += map(int, (task / "children").read_text().split())
    return pids


def _reap(pid: int, deadline: float) -> None:
    with suppress(ChildProcessError, ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            os.waitpid(pid, os.WNOHANG)
        finally:
            os.close(fd)
