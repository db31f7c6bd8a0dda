"""The commit rule, exhaustively over small worlds."""

import itertools

import pytest

from mnemosyne_plugin.errors import NoSourceForState, StateMismatch
from mnemosyne_plugin.recovery.commit import Outcome, Report, buddies, decide, wards


def report(
    rank: int, version: int, *, voted: bool = False, newcomer: bool = False
) -> Report:
    mirrors = dict.fromkeys(wards(rank, 4, 2), (version, version + 1))
    return Report(rank, newcomer, version, voted, {} if newcomer else mirrors)


def test_a_step_that_nobody_saw_committed_is_redone_by_all() -> None:
    reports = [report(0, 5, voted=True), report(1, 5), report(2, 5, voted=True)]
    decision = decide([*reports, report(3, 0, newcomer=True)])
    assert decision.target == 5
    assert decision.roll_forward == ()
    assert decision.sources == (0, 1, 2)
    assert decision.newcomers == (3,)
    assert all(decision.outcome(rank) is Outcome.REDO for rank in range(3))


def test_one_rank_that_saw_the_commit_decides_for_all() -> None:
    reports = [report(0, 5, voted=True), report(1, 6), report(2, 5, voted=True)]
    decision = decide([*reports, report(3, 0, newcomer=True)])
    assert decision.target == 6
    assert decision.sources == (1,)
    assert decision.roll_forward == (0, 2)
    assert decision.outcome(0) is Outcome.COMMIT
    assert decision.outcome(1) is Outcome.REDO


def test_every_reachable_set_of_reports_leads_to_one_version() -> None:
    # Each rank of a world of four has died (newcomer), waits for the vote's outcome,
    # or has seen it; a rank that has not voted excludes one that has seen a commit.
    states = ("dead", "before", "voted", "seen")
    for world in itertools.product(states, repeat=4):
        if "seen" in world and "before" in world:
            continue
        reports = [
            report(
                rank,
                {"dead": 0, "before": 7, "voted": 7, "seen": 8}[state],
                voted=state == "voted",
                newcomer=state == "dead",
            )
            for rank, state in enumerate(world)
        ]
        if set(world) == {"dead"}:
            with pytest.raises(NoSourceForState):
                decide(reports)
            continue
        lost_with_buddies = any(
            world[rank] == "dead"
            and all(world[buddy] == "dead" for buddy in buddies(rank, 4, 2))
            for rank in range(4)
        )
        if lost_with_buddies:
            with pytest.raises(NoSourceForState):
                decide(reports)
            continue
        decision = decide(reports)
        assert decision.target == (8 if "seen" in world else 7)
        groups = (decision.sources, decision.newcomers, decision.roll_forward)
        assert sorted(itertools.chain(*groups)) == [0, 1, 2, 3]
        for newcomer, source in decision.local_sources.items():
            assert world[newcomer] == "dead"
            assert source in buddies(newcomer, 4, 2)


def test_a_rank_behind_that_never_voted_is_a_contradiction() -> None:
    with pytest.raises(StateMismatch):
        decide([report(0, 5), report(1, 6)])
    with pytest.raises(StateMismatch):
        decide([report(0, 4, voted=True), report(1, 6)])


def test_before_the_first_commit_no_local_state_is_needed() -> None:
    decision = decide([report(0, 0), report(1, 0, newcomer=True)])
    assert decision.target == 0
    assert decision.local_sources == {}


def test_a_report_survives_its_way_over_the_wire() -> None:
    sent = report(2, 9, voted=True)
    assert Report.from_json(sent.to_json()) == sent


@pytest.mark.parametrize(("world_size", "count"), [(1, 2), (2, 2), (3, 2), (8, 2)])
def test_buddies_and_wards_are_two_views_of_one_relation(
    world_size: int, count: int
) -> None:
    for rank in range(world_size):
        assert rank not in buddies(rank, world_size, count)
        for buddy in buddies(rank, world_size, count):
            assert rank in wards(buddy, world_size, count)
