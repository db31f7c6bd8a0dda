"""The commit rule, exhaustively over small worlds."""

import itertools

import pytest

from mnemosyne_plugin.errors import NoSourceForState, StateMismatch
from mnemosyne_plugin.recovery.commit import Outcome, Report, buddies, decide, wards

ONE_NODE = [0, 0, 0, 0]


def report(
    rank: int, version: int, *, voted: bool = False, newcomer: bool = False
) -> Report:
    mirrors = dict.fromkeys(wards(rank, ONE_NODE, 2), (version, version + 1))
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
            and all(world[buddy] == "dead" for buddy in buddies(rank, ONE_NODE, 2))
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
            assert source in buddies(newcomer, ONE_NODE, 2)


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
    sent = sharded(2, 9, clean=False, wards_at={1: (8, 9)})
    assert Report.from_json(sent.to_json()) == sent


@pytest.mark.parametrize("nodes", [[0], [0, 0], [0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_buddies_and_wards_are_two_views_of_one_relation(
    nodes: list[int], count: int
) -> None:
    for rank in range(len(nodes)):
        kept_by = buddies(rank, nodes, count)
        assert rank not in kept_by
        assert len(set(kept_by)) == min(count, len(nodes) - 1)
        for buddy in kept_by:
            assert rank in wards(buddy, nodes, count)


@pytest.mark.parametrize("num_nodes", [2, 3, 4])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 8])
def test_a_buddy_is_on_another_node_if_there_is_one(
    num_nodes: int, ranks_per_node: int
) -> None:
    nodes = [node for node in range(num_nodes) for _ in range(ranks_per_node)]
    for rank, node in enumerate(nodes):
        (buddy,) = buddies(rank, nodes, 1)
        assert nodes[buddy] != node


def sharded(
    rank: int, version: int, *, clean: bool, wards_at: dict[int, tuple[int, ...]]
) -> Report:
    """Return the report of a rank that has the last two versions of its own shard."""
    return Report(
        rank,
        newcomer=False,
        version=version,
        has_voted=True,
        mirrors=dict.fromkeys(wards(rank, ONE_NODE, 2), (5, 6, 7, 8, 9)),
        is_sharded=True,
        is_clean=clean,
        snapshots=(version - 1, version),
        wards=wards_at,
    )


def test_shards_go_back_to_the_newest_version_that_is_complete() -> None:
    # Version 8 is committed. Each rank is in its mutation (7, not clean), or behind it
    # (8), and a buddy has its ward's snapshot of 8 if that one is behind it and has
    # been heard; or the rank is dead, and the copies that it kept with it.
    states = ("dead", "mutating", "done", "heard")
    for world in itertools.product(states, repeat=4):
        reports, held = [], {}
        for rank, state in enumerate(world):
            if state == "dead":
                reports.append(Report(rank, True, 0, False, is_sharded=True))
                continue
            (ward,) = wards(rank, ONE_NODE, 1)
            held[ward] = (7, 8) if world[ward] in ("heard", "dead") else (7,)
            reports.append(
                sharded(
                    rank,
                    7 if state == "mutating" else 8,
                    clean=state != "mutating",
                    wards_at={ward: held[ward]},
                )
            )
        dead = [rank for rank in range(4) if world[rank] == "dead"]
        if len(dead) == 4 or any(rank not in held for rank in dead):
            with pytest.raises(NoSourceForState) as error:
                decide(reports)
            if len(dead) < 4:
                lost = [rank for rank in dead if rank not in held]
                assert error.value.keys == tuple(f"shard/{rank}" for rank in lost)
            continue
        decision = decide(reports)
        # A newcomer cannot go back behind where it begins: it begins where all the
        # living have their copies, if there is such a version.
        living = [rank for rank in range(4) if rank not in dead]
        has_old, has_new = (
            all(version in held.get(rank, ()) for rank in living) for version in (7, 8)
        )
        is_early = "mutating" in world or (dead and has_old and not has_new)
        assert decision.target == (7 if is_early else 8)
        assert decision.roll_forward == ()
        assert decision.newcomers == tuple(dead)
        for newcomer, source in decision.shard_sources.items():
            assert buddies(newcomer, ONE_NODE, 1) == (source,)


def test_a_half_done_mutation_is_no_version_to_go_on_from() -> None:
    dirty = sharded(0, 7, clean=False, wards_at={})
    assert decide([dirty, sharded(1, 7, clean=True, wards_at={})]).target == 7
    without_copy = Report(
        0, False, 7, True, is_sharded=True, is_clean=False, snapshots=(6,)
    )
    other = sharded(1, 7, clean=True, wards_at={})
    assert decide([without_copy, other]).target == 6
