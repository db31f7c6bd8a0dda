"""The one source of metrics and timelines: every process appends JSON lines.

Each line is one ``Event``. Lines of up to PIPE_BUF bytes are written by a single
``write`` on an O_APPEND descriptor, so that a process killed at any byte leaves at
most one torn line, which the reader skips.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened once: its name, wall-clock time and facts."""

    name: str
    time_s: float
    """Seconds since the Unix epoch, comparable between processes of one host."""
    fields: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """Appends events to ``<run_dir>/events/<process>.jsonl``.

    Without a run directory it does nothing. Thread-safe: one ``write`` per event.
    """

    def __init__(self, run_dir: str | None, process: str, **common: Any) -> None:
        self._common = common
        self._fd = -1
        if run_dir is None:
            return
        folder = Path(run_dir) / "events"
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(folder / f"{process}.jsonl", flags, 0o644)

    def emit(self, name: str, **fields: Any) -> None:
        """Append one event; ``fields`` must be JSON values."""
        if self._fd < 0:
            return
        record = {"event": name, "time_s": time.time(), **self._common, **fields}
        os.write(self._fd, (json.dumps(record) + "\n").encode())

    def close(self) -> None:
        """Close the file. Events after this are dropped."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def read_events(run_dir: str | Path) -> list[Event]:
    """Return all events of a run, oldest first; skips lines torn by a death."""
    return sorted(_lines(Path(run_dir) / "events"), key=lambda event: event.time_s)


def _lines(folder: Path) -> Iterator[Event]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                name, time_s = record.pop("event"), float(record.pop("time_s"))
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            yield Event(name=name, time_s=time_s, fields=record)
