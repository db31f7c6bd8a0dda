"""The step-commit rule. Pure: reports in, decision out.

A step commits when every rank has voted for it. Whoever saw the vote succeed went on
and holds the next version; whoever did not see it still voted, so one rank that knows
decides for all.

That is enough where state is replicated: who is behind goes on by itself. With shards
nobody can, so all go back to the newest version that is complete everywhere, and do
again what came after it.
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
    is_sharded: bool = False
    """Holds state that no other rank has."""
    is_clean: bool = True
    """Not in the middle of a mutation: the live state is just ``version``."""
    snapshots: Sequence[int] = ()
    """Versions of its own shard that this rank can go back to."""
    furthest: int = 0
    """The newest version that it has ever held."""
    saved: Sequence[int] = (-1, 0)
    """The last checkpoint that it knows is in place: at which version, which there."""
    checkpoint: str = ""
    """Where that is, or the one it has loaded."""
    is_stopping: bool = False
    """It knows that the job ends in front of the next step."""
    has_lost_device: bool = False
    """That is the failure, or one of several."""
    wards: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Ward -> versions of its shard that this rank keeps."""
    loading: Mapping[str, Any] = field(default_factory=dict)
    """What it loads, in front of which ``version``; empty if it loads nothing."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; keys become text."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            name: {str(ward): list(v) for ward, v in getattr(self, name).items()}
            for name in ("mirrors", "wards")
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Report":
        """Undo ``to_json``."""
        by_ward = {
            name: {int(ward): tuple(v) for ward, v in values[name].items()}
            for name in ("mirrors", "wards")
        }
        lists = {name: tuple(values[name]) for name in ("snapshots", "saved")}
        return cls(**{**values, **by_ward, **lists})


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
    """Newcomer -> rank that sends it its own local state, or what is newer of it."""
    shard_sources: Mapping[int, int] = field(default_factory=dict)
    """Newcomer -> rank that sends it its own shard."""

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
    if any(report.is_sharded for report in holders):
        return _decide_for_shards(holders, newcomers)
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


def _decide_for_shards(holders: Sequence[Report], newcomers: Sequence[int]) -> Decision:
    """Go back to the newest version that every rank or a buddy of it holds.

    One that a buddy of each living rank holds as well comes first, though it may be
    older: another rank may die before what is missing there is sent again.
    """
    known = {report.version for report in holders}
    known.update(version for report in holders for version in report.snapshots)
    possible = [
        decision
        for target in sorted(known, reverse=True)
        if (decision := _go_back_to(target, holders, newcomers)) is not None
    ]
    safe = [
        decision
        for decision in possible
        if all(_is_kept(report.rank, decision.target, holders) for report in holders)
    ]
    if possible:  # a newcomer cannot go back behind where it begins
        return (safe or possible)[0] if newcomers else possible[0]
    kept = {ward for report in holders for ward in report.wards if report.wards[ward]}
    lost = tuple(newcomer for newcomer in newcomers if newcomer not in kept)
    raise NoSourceForState(
        f"the shards of ranks {list(lost or newcomers)} are lost: they and all their "
        "buddies died together; restart from your last checkpoint",
        tuple(f"shard/{rank}" for rank in lost or newcomers),
    )


def _go_back_to(
    target: int, holders: Sequence[Report], newcomers: Sequence[int]
) -> Decision | None:
    if not all(_has(report, target) for report in holders):
        return None
    shard_sources = {
        newcomer: report.rank
        for newcomer in newcomers
        for report in holders
        if target in report.wards.get(newcomer, ())
    }
    if len(shard_sources) < len(newcomers):
        return None
    return Decision(
        target=target,
        sources=tuple(report.rank for report in holders),
        newcomers=tuple(newcomers),
        roll_forward=(),
        local_sources=shard_sources if target > 0 else {},
        shard_sources=shard_sources,
    )


def _is_kept(rank: int, version: int, holders: Sequence[Report]) -> bool:
    """Whether somebody else has this version of the rank's shard."""
    return any(version in report.wards.get(rank, ()) for report in holders)


def _has(report: Report, version: int) -> bool:
    is_live = report.is_clean and report.version == version
    return is_live or version in report.snapshots


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


def buddies(rank: int, nodes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the ranks that keep what only ``rank`` has.

    nodes: the node that each rank is on. All ranks take their buddies at the same
    distances in the ring, so each keeps for as many as keep for it; distances at which
    more ranks have a buddy on another node come first, then short ones.
    """
    return tuple((rank + shift) % len(nodes) for shift in _shifts(nodes, count))


def wards(rank: int, nodes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the ranks whose state ``rank`` keeps."""
    return tuple((rank - shift) % len(nodes) for shift in _shifts(nodes, count))


def _shifts(nodes: Sequence[int], count: int) -> list[int]:
    size = len(nodes)

    def num_near(shift: int) -> int:
        return sum(nodes[rank] == nodes[(rank + shift) % size] for rank in range(size))

    return sorted(range(1, size), key=lambda shift: (num_near(shift), shift))[:count]
