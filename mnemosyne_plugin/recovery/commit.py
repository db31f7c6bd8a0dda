"""The step-commit rule. Pure: reports in, decision out.

A step commits when every rank has voted for it. Whoever saw the vote succeed went on
and holds the next version; whoever did not see it still voted, so one rank that knows
decides for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mnemosyne_plugin.errors import NoSourceForState, StateMismatch


class Outcome(Enum):
    """What a rank does with the step it is in."""

    COMMIT = "commit"
    """Every rank voted yes: mutate."""
    REDO = "redo"
    """Somebody may not have: drop the gradients and run the step again."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of itself after a failure."""

    rank: int
    newcomer: bool
    """Has no state yet; ``version`` means nothing."""
    version: int
    """How many steps are applied to this rank's state."""
    has_voted: bool
    """Voted for step number ``version`` and has not seen the outcome."""
    mirrors: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Ward -> versions of its local state that this rank keeps."""
    mirror_bytes: int = 0
    """Size of this rank's packed random state."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; the keys of ``mirrors`` become text."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "mirrors": {str(ward): list(v) for ward, v in self.mirrors.items()}
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Report":
        """Undo ``to_json``."""
        mirrors = {int(ward): tuple(v) for ward, v in values["mirrors"].items()}
        return cls(**{**values, "mirrors": mirrors})


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do, computed by each of them from the same reports."""

    target: int
    """The version that everybody has when this recovery is over."""
    sources: tuple[int, ...]
    """Ranks that hold the target version now, and send it."""
    newcomers: tuple[int, ...]
    roll_forward: tuple[int, ...]
    """Ranks one behind: they voted, so they go on with the mutation."""
    local_sources: Mapping[int, int]
    """Newcomer -> rank that sends it its own local state."""

    def outcome(self, rank: int) -> Outcome:
        """Return what ``rank``, which was in a step, does with that step."""
        return Outcome.COMMIT if rank in self.roll_forward else Outcome.REDO


def decide(reports: Sequence[Report]) -> Decision:
    """Apply the rule to one report of every rank.

    Raises NoSourceForState if no rank is left that holds the state, or a newcomer's
    local state is with nobody; StateMismatch if the reports contradict each other.
    """
    holders = [report for report in reports if not report.newcomer]
    newcomers = tuple(report.rank for report in reports if report.newcomer)
    if not holders:
        raise NoSourceForState(
            "no rank is left that holds the state: all replicas were lost at once; "
            "restart from your last checkpoint",
            ("replicated",),
        )
    target = max(report.version for report in holders)
    behind = [report for report in holders if report.version < target]
    for report in behind:
        if report.version < target - 1 or not report.has_voted:
            raise StateMismatch(
                f"rank {report.rank} holds version {report.version} without a vote, "
                f"while another rank holds {target}",
                key="version",
            )
    return Decision(
        target=target,
        sources=tuple(r.rank for r in holders if r.version == target),
        newcomers=newcomers,
        roll_forward=tuple(r.rank for r in behind),
        local_sources={
            newcomer: _local_source(newcomer, target, holders)
            for newcomer in newcomers
            if target > 0
        },
    )


def _local_source(newcomer: int, target: int, holders: Sequence[Report]) -> int:
    for report in holders:
        if target in report.mirrors.get(newcomer, ()):
            return report.rank
    raise NoSourceForState(
        f"rank {newcomer} and all its buddies were lost at once: nobody holds its "
        f"random state and data position at step {target}; restart from your last "
        "checkpoint",
        (f"local/{newcomer}",),
    )


def buddies(rank: int, world_size: int, count: int) -> tuple[int, ...]:
    """Return the ranks that keep ``rank``'s local state: the next ones in the ring."""
    return tuple(
        (rank + i) % world_size for i in range(1, min(count, world_size - 1) + 1)
    )


def wards(rank: int, world_size: int, count: int) -> tuple[int, ...]:
    """Return the ranks whose local state ``rank`` keeps."""
    return tuple(
        (rank - i) % world_size for i in range(1, min(count, world_size - 1) + 1)
    )
