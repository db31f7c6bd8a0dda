"""What must hold after a job lost workers and went on."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster import LocalCluster
from mnemosyne_plugin.events import Event


def assert_survived(
    job: LocalCluster, healthy: LocalCluster, kills: Mapping[int, int]
) -> None:
    """Assert that a job which ended by itself trained as if nothing had happened.

    kills: rank -> how many of its workers were killed.
    """
    assert_same_training(job, healthy, kills)
    assert_survivors_stayed(job, kills)
    assert_redone_at_most_once(job)
    job.check_nothing_is_left()


def assert_same_training(
    job: LocalCluster, healthy: LocalCluster, kills: Mapping[int, int]
) -> None:
    """Losses and final state are those of the healthy job, bit for bit.

    A worker that dies between a step's commit and its log line takes the line along:
    the step is done, nobody makes it again. That is one line per kill at most. With
    shards a newcomer begins one step earlier, and its script logs that one again.
    """
    losses, want = job.losses(), healthy.losses()
    assert losses.items() <= want.items(), difference(losses, want)
    missing = Counter(rank for _, rank in want.keys() - losses.keys())
    assert all(missing[rank] <= kills.get(rank, 0) for rank in missing), missing
    repeated = job.num_repeated()
    assert all(repeated[rank] <= kills.get(rank, 0) for rank in repeated), repeated
    assert job.digests() == healthy.digests()


def assert_survivors_stayed(job: LocalCluster, kills: Mapping[int, int]) -> None:
    """Ranks that nobody killed kept their process and their ProcessGroup objects."""
    for rank in range(job.num_agents * job.procs_per_agent):
        assert len(job.pids(rank)) == 1 + kills.get(rank, 0), job.output()
        groups = [e.fields["ids"] for e in of_rank(job.events("groups"), rank)]
        if rank not in kills:
            assert len(groups) >= 2 and all(ids == groups[0] for ids in groups), groups


def assert_redone_at_most_once(job: LocalCluster) -> None:
    """No rank made more than one redo in any epoch."""
    redone = Counter((e.fields["epoch"], e.fields["rank"]) for e in job.events("redo"))
    assert all(times == 1 for times in redone.values()), redone


def assert_only_links_of_the_dead_were_replaced(job: LocalCluster) -> None:
    """In a repair of one worker each survivor replaced one link, and no other."""
    world_size = job.num_agents * job.procs_per_agent
    links: Counter[int] = Counter()
    for event in job.events("reconfigured"):
        links[event.fields["epoch"]] += event.fields["links_replaced"]
    repairs = {epoch: count for epoch, count in links.items() if epoch > 1}
    assert repairs, "no repair at all"
    assert set(repairs.values()) == {world_size - 1}, repairs


def of_rank(events: Sequence[Event], rank: int) -> list[Event]:
    return [event for event in events if event.fields["rank"] == rank]


def difference(
    got: Mapping[tuple[int, int], str], want: Mapping[tuple[int, int], str]
) -> str:
    """Say where the first loss differs, which is what one needs to look into it."""
    first = min(key for key in got if got[key] != want.get(key))
    return f"step {first[0]} rank {first[1]}: {got[first]}, not {want.get(first)}"
