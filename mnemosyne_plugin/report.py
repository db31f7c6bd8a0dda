"""From events to the table of recoveries that is printed at the end of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemosyne_plugin.events import Event, read_events


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """One recovery: from a failure to the first step that all ranks finished after it.

    Times are seconds since the Unix epoch; None: it did not happen (yet).
    """

    epoch: int
    """The epoch that succeeded; those that burned on the way have no row."""
    ranks: tuple[int, ...]
    """The ranks that were seated anew."""
    fault_s: float | None
    """When chaos testing did it."""
    detected_s: float | None
    """The first exit or lost link that an agent heard of."""
    agreed_s: float
    """The membership was published."""
    num_links_replaced: int
    links_s: float | None
    """The last survivor's mesh was in the new epoch."""
    setup_done_s: float | None
    """The last newcomer was through the script's set-up."""
    state_bytes: int
    state_duration_s: float
    """How long the slowest newcomer took to receive its state."""
    state_s: float | None
    first_step_s: float | None
    """All ranks finished a step again."""
    num_steps_redone: int
    """On the rank that redid most."""

    @property
    def begin_s(self) -> float:
        """When it began, as well as we know."""
        known = [t for t in (self.fault_s, self.detected_s) if t is not None]
        return min(known, default=self.agreed_s)

    @property
    def total_ms(self) -> float | None:
        """From its begin until all ranks had finished a step again."""
        if self.first_step_s is None:
            return None
        return (self.first_step_s - self.begin_s) * 1000


def recoveries(run_dir: str | Path) -> list[Recovery]:
    """Return the recoveries of a run, oldest first."""
    return from_events(read_events(run_dir))


def from_events(events: Sequence[Event]) -> list[Recovery]:
    """Return the recoveries that these events, oldest first, tell of.

    A run directory may have been used before: only its last job counts.
    """
    starts = [i for i, event in enumerate(events) if event.name == "job_started"]
    events = events[starts[-1] :] if starts else events
    agreed: dict[int, float] = {}
    initial: set[int] = set()
    is_initial = True
    for event in events:
        if event.name == "restarted":
            is_initial = True
        elif event.name == "membership" and event.fields["epoch"] not in agreed:
            agreed[event.fields["epoch"]] = event.time_s
            if is_initial:
                initial.add(event.fields["epoch"])
            is_initial = False
    ranks = {e.fields["rank"] for e in events if e.name == "seated"}
    rows: list[Recovery] = []
    since = 0.0
    burned: list[int] = []
    for epoch in sorted(agreed):
        if epoch in initial:
            since, burned = agreed[epoch], []
            continue
        burned.append(epoch)
        stepped = {e.fields["rank"] for e in _of(events, [epoch], "first_step")}
        if stepped >= ranks or epoch == max(agreed):
            is_over = stepped >= ranks
            rows.append(_recovery(events, burned, since, agreed, is_over))
            since, burned = agreed[epoch], []
    return rows


def _recovery(
    events: Sequence[Event],
    epochs: Sequence[int],
    since: float,
    agreed: dict[int, float],
    is_over: bool,
) -> Recovery:
    last = epochs[-1]
    window = [e for e in events if since < e.time_s <= agreed[last]]
    # Late reports of links that an earlier membership replaced are no news.
    lost = [e for e in window if e.name in ("link_lost", "device_lost")]
    lost = [e for e in lost if e.fields["epoch"] >= epochs[0] - 1]
    signs = [*lost, *(e for e in window if _is_death(e))]
    links = _of(events, epochs, "reconfigured")
    states = _of(events, epochs, "state_received")
    redone: dict[int, int] = {}
    for event in _of(events, epochs, "redo"):
        redone[event.fields["rank"]] = redone.get(event.fields["rank"], 0) + 1
    steps = _of(events, [last], "first_step")
    return Recovery(
        epoch=last,
        ranks=tuple(sorted({e.fields["rank"] for e in _seated_anew(events, epochs)})),
        fault_s=min((e.time_s for e in window if e.name == "fault"), default=None),
        detected_s=min((e.time_s for e in signs), default=None),
        agreed_s=agreed[last],
        num_links_replaced=sum(e.fields["links_replaced"] for e in links),
        links_s=_last(e for e in links if e.fields["epoch"] == last),
        setup_done_s=_last(_of(events, epochs, "setup_done")),
        state_bytes=sum(e.fields["bytes"] for e in states),
        state_duration_s=max((e.fields["seconds"] for e in states), default=0.0),
        state_s=_last(states),
        first_step_s=_last(steps) if is_over else None,
        num_steps_redone=max(redone.values(), default=0),
    )


def _of(events: Iterable[Event], epochs: Sequence[int], name: str) -> list[Event]:
    return [e for e in events if e.name == name and e.fields.get("epoch") in epochs]


def _seated_anew(events: Iterable[Event], epochs: Sequence[int]) -> list[Event]:
    return [e for e in _of(events, epochs, "seated") if e.fields.get("newcomer")]


def _is_death(event: Event) -> bool:
    if event.name != "worker_exited" or event.fields.get("rank") is None:
        return False
    return bool(event.fields.get("exit_code"))


def _last(events: Iterable[Event]) -> float | None:
    return max((event.time_s for event in events), default=None)


_HEADER = (
    *("epoch", "rank", "detected", "agreed", "links replaced", "set-up done"),
    *("state received", "first step", "total ms", "steps redone"),
)


def table(rows: Sequence[Recovery]) -> str:
    """Return the recoveries as aligned text, or nothing if there were none."""
    if not rows:
        return ""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(["recoveries (ms since the failure):", *text])


def _cells(row: Recovery) -> tuple[str, ...]:
    def at(time_s: float | None) -> str:
        return "-" if time_s is None else f"{(time_s - row.begin_s) * 1000:.1f}"

    links, state = "-", "-"
    if row.links_s is not None:
        links = f"{row.num_links_replaced} at {at(row.links_s)}"
    if row.state_s is not None:
        size_mb, duration_ms = row.state_bytes / 1e6, row.state_duration_s * 1000
        state = f"{size_mb:.1f} MB in {duration_ms:.1f} at {at(row.state_s)}"
    return (
        str(row.epoch),
        ",".join(map(str, row.ranks)) or "-",
        at(row.detected_s),
        at(row.agreed_s),
        links,
        at(row.setup_done_s),
        state,
        at(row.first_step_s),
        "-" if row.total_ms is None else f"{row.total_ms:.1f}",
        str(row.num_steps_redone),
    )


def to_json(row: Recovery) -> dict[str, Any]:
    """Return one recovery as JSON values, for benchmarks."""
    fields: dict[str, Any] = {name: getattr(row, name) for name in Recovery.__slots__}
    return fields | {"total_ms": row.total_ms}
