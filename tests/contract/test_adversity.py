"""Workers that die, hang, are cut off or starve: errors in time, right results after.

Byte-level adversity is in tests/cpp: cut_test.cc, fuzz_test.cc, handshake_test.cc.
"""

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adversity import (
    all_reduce,
    await_failure,
    connect,
    counters,
    cut_shm,
    cut_tcp,
    holdings,
    identity,
    intrude,
    lift_limits,
    limit_descriptors,
    limit_shared_memory,
    names_of_links,
    pretend,
    receive,
    reduce_in_time,
    remember,
    reset_tcp,
    try_to,
    work_until_failure,
)
from world import World, _seat

SIZE = 4
SUM = 10.0
# Far below every timeout: whoever waits as long was not told of the failure.
PROMPT_S = 5.0


@pytest.mark.parametrize("victims", [(0, 1), (1, 3), (2, 3)])
def test_two_who_die_at_once_are_replaced_together(
    world: World, victims: tuple[int, int]
) -> None:
    survivors = [rank for rank in range(SIZE) if rank not in victims]
    world.start(work_until_failure, 100_000, ranks=range(SIZE))
    time_killed = time.monotonic()
    for victim in victims:
        world.kill(victim)
    for kind, rank, _ in world.results(survivors):
        assert kind == "PeerLost" and rank in victims
    assert time.monotonic() - time_killed < PROMPT_S

    for victim in victims:
        world.replace(victim)
    replaced = world.seat()

    assert [replaced[rank] for rank in survivors] == [2, 2]
    assert world.run(all_reduce, 100_000) == [SUM] * SIZE
    world.run(connect)


@pytest.mark.parametrize("victim", [0, 2])
def test_one_who_dies_while_all_move_to_an_epoch_is_replaced_in_the_next(
    world: World, victim: int
) -> None:
    world.kill(3 - victim)
    world.replace(3 - victim)
    world.epoch += 1
    survivors = [rank for rank in range(SIZE) if rank != victim]
    command = (world.epoch, world._members)
    for rank in range(SIZE):
        world._pipes[rank].send((_seat, (command[0], rank, command[1])))
    world.kill(victim)
    world.results(survivors)

    # Those who move on first tell the others: no rank is left waiting.
    world.start(try_to, connect, ranks=survivors)
    for kind, _, _ in world.results(survivors):
        assert kind in ("PeerLost", "StaleEpoch")
    world.heal()
    assert world.run(all_reduce) == [SUM] * SIZE
    world.run(connect)


def test_results_are_right_after_each_of_many_random_deaths(world: World) -> None:
    """tests/cpp/soak_test.cc makes a thousand, with lighter workers."""
    choose = random.Random(1)
    before: list[Any] = []
    for n in range(25):
        victims = choose.sample(range(1, SIZE), choose.randint(0, 2))
        if victims:
            world.start(work_until_failure, choose.choice((10, 50_000)), ranks=[0])
        for victim in victims:
            world.kill(victim)
        if victims:
            [(kind, rank, _)] = world.results([0])
            assert kind == "PeerLost" and rank in victims
        world.heal()
        assert world.run(all_reduce, choose.randint(1, 5000)) == [SUM] * SIZE
        world.run(connect)
        if n == 5:
            before = world.run(holdings, ranks=[0])
    assert world.run(holdings, ranks=[0]) == before


# ---------------------------------------------------------------- cut links


def cut_link(world: World, one: int, other: int, how: str) -> None:
    """Cut the link between two ranks, in the process of the first."""
    ends = {"both": socket.SHUT_RDWR, "read": socket.SHUT_RD, "write": socket.SHUT_WR}
    if world.transport == "auto":
        [cut] = world.run(cut_shm, world.pid(other), ends[how], ranks=[one])
        assert cut == 1
        return
    mine, theirs = world.run(names_of_links, ranks=[one, other])
    flipped = {(peer, name) for name, peer in theirs.values()}
    [fd] = [fd for fd, names in mine.items() if names in flipped]
    function = reset_tcp if how == "reset" else cut_tcp
    world.run(function, fd, ends.get(how, 0), ranks=[one])


@pytest.mark.parametrize("how", ["both", "read", "write", "reset"])
def test_a_cut_link_is_made_anew_and_nobody_is_replaced(world: World, how: str) -> None:
    if how == "reset" and world.transport == "auto":
        pytest.skip("there is no reset of shared memory")
    before = world.run(identity)
    cut_link(world, 0, 2, how)
    assert world.run(await_failure, ranks=[0]) == [("PeerLost", 2)]
    assert world.run(await_failure, ranks=[2]) == [("PeerLost", 0)]

    assert world.seat() == [1, 0, 1, 0]

    assert world.run(all_reduce, 100_000) == [SUM] * SIZE
    assert world.run(connect) == [[0.0, 1.0, 2.0, 3.0]] * SIZE
    assert world.run(identity) == before
    assert [one["links_open"] for one in world.run(counters)] == [SIZE - 1] * SIZE


def test_a_link_that_is_cut_in_the_middle_of_a_collective_is_named(
    world: World,
) -> None:
    world.run(connect)
    mine, theirs = world.run(names_of_links, ranks=[1, 0])
    world.start(work_until_failure, 300_000, ranks=range(1, SIZE))
    if world.transport == "auto":
        world.run(cut_shm, world.pid(1), socket.SHUT_RDWR, ranks=[0])
    else:
        flipped = {(peer, name) for name, peer in mine.values()}
        [fd] = [fd for fd, names in theirs.items() if names in flipped]
        world.run(reset_tcp, fd, 0, ranks=[0])
    world.start(work_until_failure, 300_000, ranks=[0])
    [(kind, rank, _)] = world.results([1])
    assert (kind, rank) == ("PeerLost", 0)
    world.epoch += 1  # who has lost nobody is told by the new epoch
    for rank in range(SIZE):
        world._pipes[rank].send((_seat, (world.epoch, rank, world._members)))
    kinds = [kind for kind, _, _ in world.results([0, 2, 3])]
    assert set(kinds) <= {"PeerLost", "StaleEpoch"}
    assert world.results(range(SIZE)) == [1, 1, 0, 0]
    assert world.run(all_reduce, 300_000) == [SUM] * SIZE


# ---------------------------------------------------------------- stopped, slow


def test_a_stopped_worker_is_named_and_not_replaced(world: World) -> None:
    before = world.run(identity)
    world.stop(2)
    try:
        for kind, rank, text in world.run(try_to, receive, 2, 0.4, ranks=[0, 1, 3]):
            assert (kind, rank) == ("CollectiveTimeout", 2) and "[2]" in text
    finally:
        world.resume(2)
    assert world.seat() == [0] * SIZE
    assert world.run(all_reduce, 100_000) == [SUM] * SIZE
    assert world.run(identity) == before


def test_somebody_names_the_one_for_whom_a_collective_waits(world: World) -> None:
    for numel in (10, 1_000_000):
        world.stop(1)
        try:
            failed = world.run(try_to, reduce_in_time, numel, 0.5, ranks=[0, 2, 3])
        finally:
            world.resume(1)
        assert {kind for kind, _, _ in failed} == {"CollectiveTimeout"}
        assert any(rank == 1 for _, rank, _ in failed), failed
        world.seat()
        assert world.run(all_reduce, numel) == [SUM] * SIZE


# ---------------------------------------------------------------- no members


def test_a_worker_of_another_job_disturbs_nobody(world: World) -> None:
    refused = world.run(counters, ranks=[3])[0]["handshakes_refused"]
    kind, rank, text = world.run(
        intrude, b"another secret", world.epoch, world._members, ranks=[0]
    )[0]
    assert (kind, rank) == ("PeerLost", 3) and "handshake" in text
    # The intruder is who hangs up: it sees first that the secrets differ.
    assert world.run(counters, ranks=[3])[0]["handshakes_refused"] >= refused
    assert world.run(all_reduce) == [SUM] * SIZE


def test_a_worker_of_this_job_that_is_no_member_is_not_let_in(world: World) -> None:
    from world import SECRET

    members = world._members
    started = time.monotonic()
    kind, rank, _ = world.run(intrude, SECRET, world.epoch, members, ranks=[0])[0]
    assert (kind, rank) == ("PeerLost", 3)
    assert time.monotonic() - started < PROMPT_S
    assert world.run(all_reduce) == [SUM] * SIZE


def test_a_worker_that_was_replaced_but_lives_on_disturbs_nobody(world: World) -> None:
    world.run(remember, list(world._members))
    pipe, process = world._pipes[2], world._processes[2]
    world.replace(2)
    try:
        world.seat()
        assert world.run(all_reduce) == [SUM] * SIZE
        pipe.send((pretend, (world.epoch,)))
        assert pipe.poll(30)
        said, failure = pipe.recv()
        assert said == "ok" and failure[0] == "PeerLost"
        assert world.run(all_reduce) == [SUM] * SIZE
        world.run(connect)
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------- exhaustion


@pytest.fixture(params=["auto", "tcp"])
def fresh_pair(request: pytest.FixtureRequest) -> Iterator[World]:
    """Two ranks without a link yet."""
    with World(2, request.param) as world:
        yield world
        world.run(lift_limits)


@pytest.mark.parametrize("starved", [0, 1])
def test_without_a_descriptor_there_is_an_error_in_time(
    fresh_pair: World, starved: int
) -> None:
    world = fresh_pair
    world.run(limit_descriptors, 0, ranks=[starved])
    started = time.monotonic()
    for kind, rank, _ in world.run(try_to, connect, 2.0):
        assert kind in ("PeerLost", "CollectiveTimeout", "StaleEpoch"), kind
        assert rank in (0, 1)
    assert time.monotonic() - started < 2.0 + PROMPT_S
    world.run(lift_limits, ranks=[starved])
    world.seat()
    assert world.run(connect) == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("starved", [0, 1])
def test_without_a_descriptor_for_memory_the_link_is_made_over_tcp(
    fresh_pair: World, starved: int
) -> None:
    world = fresh_pair
    world.run(limit_descriptors, 1, ranks=[starved])
    assert world.run(connect) == [[0.0, 1.0]] * 2
    assert [one["links_shm"] for one in world.run(counters)] == [0, 0]


@pytest.mark.parametrize("starved", [(0,), (1,), (0, 1)])
def test_without_shared_memory_the_link_is_made_over_tcp(
    fresh_pair: World, starved: tuple[int, ...]
) -> None:
    world = fresh_pair
    world.run(limit_shared_memory, 100_000, ranks=starved)
    assert world.run(connect) == [[0.0, 1.0]] * 2
    if len(starved) == 2:
        assert [one["links_shm"] for one in world.run(counters)] == [0, 0]


# ---------------------------------------------------------------- lost packets


def test_a_network_that_loses_everything_is_a_timeout_and_then_a_repair() -> None:
    script = Path(__file__).with_name("blackhole.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=55
    )
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
