"""The leader's rule: each rule by itself, then all small worlds."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.membership import (
    SETUP_RESTARTS,
    STILLBORN_LIMIT,
    AgentLost,
    Cure,
    Decision,
    DeviceLost,
    Done,
    Evidence,
    Exited,
    Finish,
    GraceOver,
    Job,
    LinkLost,
    Member,
    Membership,
    Protected,
    Ready,
    Restart,
    SetupLogged,
    Stop,
    apply,
    decode,
    encode,
    new_job,
)

KILLED, RAISED, LEFT = -9, 1, 0


class World:
    """A job and what agents tell of it; workers are numbered as they become ready."""

    def __init__(self, *procs: int, max_restarts: int | None = None) -> None:
        self.job = new_job(procs, max_restarts)
        self.last_id = 0

    def see(self, evidence: Evidence) -> tuple[Decision, ...]:
        self.job, decisions, _ = apply(self.job, evidence)
        return decisions

    def ready(self, agent: int = 0) -> tuple[Decision, ...]:
        self.last_id += 1
        return self.see(
            Ready(
                attempt=self.job.attempt,
                agent=agent,
                worker_id=self.last_id,
                address=f"address {self.last_id}",
            )
        )

    def exit(
        self,
        rank: int,
        exit_code: int = KILLED,
        fatal: bool = False,
        is_state_lost: bool = False,
        step: int = -1,
        cure: Cure = Cure.NONE,
    ) -> tuple[Decision, ...]:
        member = self.job.seats[rank]
        assert member is not None
        return self.see(
            Exited(
                attempt=self.job.attempt,
                agent=member.agent,
                worker_id=member.worker_id,
                exit_code=exit_code,
                fatal=fatal,
                is_state_lost=is_state_lost,
                step=step,
                cure=cure,
                device_error="GPU 1 has failed, on node h" if cure else "",
            )
        )

    def fill(self) -> None:
        for agent, count in enumerate(self.job.procs):
            for _ in range(count):
                self.ready(agent)

    def protect(self, may_restart: bool = False) -> None:
        for rank in range(len(self.job.seats)):
            attempt = self.job.attempt
            self.see(SetupLogged(attempt=attempt, rank=rank))
            self.see(Protected(attempt=attempt, rank=rank, may_restart=may_restart))


def training(*procs: int, max_restarts: int | None = None) -> World:
    world = World(*procs, max_restarts=max_restarts)
    world.fill()
    world.protect()
    return world


def ids(decisions: tuple[Decision, ...]) -> list[int]:
    (membership,) = decisions
    assert isinstance(membership, Membership)
    return [member.worker_id for member in membership.members]


def end(decisions: tuple[Decision, ...]) -> int:
    (finish,) = decisions
    assert isinstance(finish, Finish)
    return finish.exit_code


# --- seating ----------------------------------------------------------------------


def test_the_first_membership_waits_for_a_worker_on_every_rank() -> None:
    world = World(2, 1)
    assert world.ready(0) == () and world.ready(0) == ()
    assert world.ready(0) == ()  # a standby of agent 0 is no help for agent 1
    assert ids(world.ready(1)) == [1, 2, 4]
    assert world.job.epoch == 1


def test_a_standby_takes_the_rank_of_a_killed_worker_at_once() -> None:
    world = training(2)
    world.ready()
    assert ids(world.exit(0)) == [3, 2]
    assert world.job.epoch == 2


def test_without_a_standby_the_rank_waits_for_a_fresh_worker() -> None:
    world = training(2)
    assert world.exit(1) == ()
    assert ids(world.ready()) == [1, 3]


def test_only_a_worker_of_the_same_agent_takes_a_rank() -> None:
    world = training(1, 1)
    world.ready(0)
    assert world.exit(1) == ()
    assert ids(world.ready(1)) == [1, 4]


def test_two_vacancies_are_filled_by_one_membership() -> None:
    world = training(3)
    assert world.exit(0) == world.exit(2) == ()
    assert world.ready() == ()
    assert ids(world.ready()) == [4, 2, 5]
    assert world.job.epoch == 2


def test_a_newcomer_that_is_killed_is_replaced_like_any_other() -> None:
    world = training(2)
    world.exit(0)
    world.ready()
    world.exit(0)
    assert ids(world.ready()) == [4, 2]
    assert world.job.epoch == 3


def test_a_standby_that_dies_is_not_seated() -> None:
    world = training(1, 1)
    world.ready(0)
    standby = world.job.ready[0]
    gone = Exited(attempt=0, agent=0, worker_id=standby.worker_id, exit_code=KILLED)
    assert world.see(gone) == ()
    assert world.exit(0) == ()


def test_evidence_about_an_attempt_that_is_over_is_ignored() -> None:
    world = World(1)
    world.fill()
    (restart,) = world.exit(0)
    assert restart == Restart(attempt=1, reason=restart.reason)  # type: ignore[union-attr]
    before = world.job
    world.see(Ready(attempt=0, agent=0, worker_id=9, address=""))
    assert world.job == before


# --- set-up -----------------------------------------------------------------------


def test_kills_in_set_up_restart_the_job_a_few_times() -> None:
    world = World(2)
    for attempt in range(1, SETUP_RESTARTS + 1):
        world.fill()
        (restart,) = world.exit(1)
        assert isinstance(restart, Restart) and restart.attempt == attempt
        assert world.job.seats == (None, None)
    world.fill()
    assert end(world.exit(1)) == 1


def test_epochs_grow_across_a_restart() -> None:
    world = World(1)
    world.fill()
    world.exit(0)
    world.fill()
    assert world.job.epoch == 2


def test_max_restarts_bounds_restarts_in_set_up() -> None:
    world = World(1, max_restarts=0)
    world.fill()
    assert end(world.exit(0)) == 1


def test_an_exception_in_set_up_ends_the_job() -> None:
    world = World(2)
    world.fill()
    assert end(world.exit(1, RAISED)) == 1
    assert world.job.finish is not None and world.job.finish.rank == 1


def test_an_exception_in_set_up_restarts_the_job_if_the_user_asks_for_it() -> None:
    world = World(2, max_restarts=1)
    world.fill()
    assert isinstance(world.exit(1, RAISED)[0], Restart)
    world.fill()
    assert end(world.exit(1, RAISED)) == 1


def test_set_up_lasts_until_all_ranks_are_through() -> None:
    world = World(2)
    world.fill()
    world.see(SetupLogged(attempt=0, rank=0))
    world.see(Protected(attempt=0, rank=0))
    world.see(Protected(attempt=0, rank=1))
    assert isinstance(world.exit(0)[0], Restart)


def test_set_up_lasts_until_all_ranks_are_protected() -> None:
    world = World(2)
    world.fill()
    for rank in range(2):
        world.see(SetupLogged(attempt=0, rank=rank))
    world.see(Protected(attempt=0, rank=0))
    assert isinstance(world.exit(1)[0], Restart)


@pytest.mark.parametrize("exit_code", [KILLED, RAISED])
def test_a_death_in_a_job_that_nothing_protects_ends_it(exit_code: int) -> None:
    for max_restarts in (None, 1):
        world = World(1, max_restarts=max_restarts)
        world.fill()
        world.see(SetupLogged(attempt=0, rank=0))
        if max_restarts:
            assert isinstance(world.exit(0, exit_code)[0], Restart)
        else:
            assert end(world.exit(0, exit_code)) == 1
            assert world.job.finish is not None
            assert "attach" in world.job.finish.reason


def test_workers_that_die_before_they_are_ready_end_the_job() -> None:
    world = World(1)
    for worker_id in range(STILLBORN_LIMIT):
        gone = Exited(attempt=0, agent=0, worker_id=worker_id + 9, exit_code=RAISED)
        decisions = world.see(gone)
    assert end(decisions) == 3


# --- training ---------------------------------------------------------------------


def test_an_exception_is_recovered_once() -> None:
    world = training(2)
    assert world.exit(1, RAISED) == ()
    assert ids(world.ready()) == [1, 3]
    world.see(Protected(attempt=0, rank=1))
    assert world.exit(0, RAISED) == ()  # another rank has its own chance
    world.ready()
    assert end(world.exit(1, RAISED)) == 1


# --- errors of devices ------------------------------------------------------------


@pytest.mark.parametrize("cure", [Cure.PROCESS, Cure.HARDWARE])
def test_a_broken_device_costs_a_worker_and_is_no_exception(cure: Cure) -> None:
    world = training(2)
    assert world.exit(1, RAISED, cure=cure, step=4) == ()
    assert ids(world.ready()) == [1, 3]
    assert world.exit(1, RAISED) == ()  # the script has its own chance


def test_a_device_that_breaks_again_in_the_same_step_ends_the_job() -> None:
    world = training(2)
    for step in (4, 5, 6):
        assert world.exit(1, RAISED, cure=Cure.PROCESS, step=step) == ()
        world.ready()
        world.see(Protected(attempt=0, rank=1))
    assert end(world.exit(1, RAISED, cure=Cure.PROCESS, step=6)) == 1
    assert world.job.finish is not None
    assert "GPU 1 has failed, on node h" in world.job.finish.reason


def test_a_device_that_breaks_in_set_up_restarts_the_job_like_a_kill() -> None:
    world = World(2)
    for _ in range(SETUP_RESTARTS):
        world.fill()
        assert isinstance(world.exit(1, RAISED, cure=Cure.PROCESS)[0], Restart)
    world.fill()
    assert end(world.exit(1, RAISED, cure=Cure.PROCESS)) == 1


def test_a_second_defect_of_the_same_device_ends_the_job() -> None:
    world = training(3)
    assert world.exit(1, RAISED, cure=Cure.HARDWARE, step=4) == ()
    world.ready()
    assert world.exit(0, RAISED, cure=Cure.HARDWARE, step=4) == ()
    world.ready()
    assert end(world.exit(1, RAISED, cure=Cure.HARDWARE, step=9)) == 3


def test_a_device_that_no_process_can_use_ends_the_job_at_once() -> None:
    for world in (training(2), World(2, max_restarts=3)):
        world.fill()
        assert end(world.exit(1, RAISED, cure=Cure.DEVICE)) == 3


def test_out_of_memory_is_never_recovered() -> None:
    for world in (training(2), World(2, max_restarts=3)):
        world.fill()
        assert end(world.exit(1, RAISED, cure=Cure.USER)) == 1


def test_a_device_that_breaks_on_all_ranks_is_lost_state() -> None:
    world = World(2)
    world.fill()
    world.protect(may_restart=True)
    world.exit(0, RAISED, cure=Cure.PROCESS, step=4)
    assert isinstance(world.exit(1, RAISED)[0], Restart)


# --- the end ----------------------------------------------------------------------


def test_an_error_that_no_worker_can_mend_ends_the_job() -> None:
    assert end(training(2).exit(1, RAISED, fatal=True)) == 3


def test_lost_state_ends_the_job_unless_it_may_restart() -> None:
    lost = {"fatal": True, "is_state_lost": True}
    assert end(training(2).exit(1, RAISED, **lost)) == 3
    world = World(2)
    for attempt in range(SETUP_RESTARTS):
        world.fill()
        world.protect(may_restart=True)
        assert isinstance(world.exit(1, RAISED, **lost)[0], Restart)
        assert world.job.attempt == attempt + 1
    world.fill()
    world.protect(may_restart=True)
    assert end(world.exit(1, RAISED, **lost)) == 3


def test_all_ranks_killed_at_once_are_lost_state_too() -> None:
    world = World(2)
    world.fill()
    world.protect(may_restart=True)
    world.exit(0)
    assert isinstance(world.exit(1)[0], Restart)


def test_an_exception_on_all_ranks_is_no_lost_state() -> None:
    world = World(2)
    world.fill()
    world.protect(may_restart=True)
    world.exit(0, RAISED)
    assert end(world.exit(1, RAISED)) == 1


def test_max_restarts_bounds_recoveries() -> None:
    world = training(2, max_restarts=1)
    world.exit(0)
    world.ready()
    assert end(world.exit(0)) == 1


def test_kills_are_mended_for_ever_by_default() -> None:
    world = training(2)
    for _ in range(100):
        world.exit(0)
        world.ready()
        world.see(Protected(attempt=0, rank=0))
    assert world.job.epoch == 101


def test_if_all_ranks_raise_at_once_the_exception_ends_the_job() -> None:
    world = training(2)
    assert world.exit(0, RAISED) == ()
    assert end(world.exit(1, KILLED)) == 1


def test_if_all_ranks_are_killed_at_once_nobody_holds_the_state() -> None:
    world = training(2)
    world.exit(0)
    world.ready()  # a newcomer that had no time to get the state
    assert end(world.exit(1)) == 3


def test_a_lost_link_between_living_workers_is_a_new_epoch_for_the_same() -> None:
    world = training(2)
    assert world.see(LinkLost(attempt=0, rank=0, lost_rank=1, epoch=1)) == ()
    assert ids(world.see(GraceOver(epoch=1))) == [1, 2]
    assert world.job.epoch == 2


def test_an_exit_explains_a_lost_link() -> None:
    world = training(2)
    world.see(LinkLost(attempt=0, rank=0, lost_rank=1, epoch=1))
    world.exit(1)
    assert world.see(GraceOver(epoch=1)) == ()
    assert ids(world.ready()) == [1, 3]
    assert world.see(GraceOver(epoch=2)) == ()
    assert world.job.epoch == 2


def test_a_lost_link_of_an_old_epoch_is_ignored() -> None:
    world = training(2)
    world.exit(1)
    world.ready()
    world.see(LinkLost(attempt=0, rank=0, lost_rank=1, epoch=1))
    assert world.see(GraceOver(epoch=2)) == ()


def device_lost(rank: int, epoch: int) -> DeviceLost:
    return DeviceLost(attempt=0, rank=rank, epoch=epoch, reason="an error")


def test_a_lost_device_is_a_new_epoch_for_the_same_at_once() -> None:
    world = training(2)
    assert ids(world.see(device_lost(1, 1))) == [1, 2]
    assert world.see(device_lost(0, 1)) == ()  # that epoch covers it
    assert ids(world.see(device_lost(0, 2))) == [1, 2]
    assert world.job.epoch == 3


def test_a_device_lost_in_set_up_waits_for_the_last_rank() -> None:
    world = World(2)
    world.fill()
    assert world.see(device_lost(0, 1)) == ()
    for rank in range(2):
        assert world.see(SetupLogged(attempt=0, rank=rank)) == ()
    assert world.see(Protected(attempt=0, rank=0)) == ()
    assert ids(world.see(Protected(attempt=0, rank=1))) == [1, 2]
    assert world.see(Protected(attempt=0, rank=1)) == ()


def test_a_device_lost_while_a_rank_is_vacant_waits_for_its_worker() -> None:
    world = training(2)
    world.exit(1)
    assert world.see(device_lost(0, 1)) == ()
    assert ids(world.ready()) == [1, 3]


# --- the end ----------------------------------------------------------------------


def test_the_job_is_done_when_all_ranks_are() -> None:
    world = training(2)
    assert world.see(Done(attempt=0, rank=1)) == ()
    assert end(world.see(Done(attempt=0, rank=0))) == 0


def test_a_done_worker_that_is_killed_runs_again() -> None:
    world = training(2)
    world.see(Done(attempt=0, rank=1))
    world.exit(1)
    assert ids(world.ready()) == [1, 3]
    assert world.see(Done(attempt=0, rank=0)) == ()
    assert end(world.see(Done(attempt=0, rank=1))) == 0


def test_a_script_that_leaves_by_itself_with_code_0_is_done() -> None:
    world = World(2)
    world.fill()
    assert world.exit(0, LEFT) == ()
    assert end(world.exit(1, LEFT)) == 0


def test_a_rank_that_left_is_run_again_if_another_must_be_mended() -> None:
    world = training(3)
    assert world.exit(0, LEFT) == ()
    assert world.ready() == world.exit(1) == ()
    assert ids(world.ready()) == [4, 5, 3]
    assert world.job.done == frozenset()


def test_a_signal_or_a_lost_agent_ends_the_job_once() -> None:
    world = training(1)
    assert end(world.see(Stop(signal=2))) == 130
    assert world.see(AgentLost(agent=0, reason="")) == ()
    assert end(training(1).see(AgentLost(agent=0, reason=""))) == 3


# --- all small worlds -------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A state of the search: what the rule knows, and the truth beside it."""

    job: Job
    living: frozenset[int]
    num_born: int = 0


def possible(now: Snapshot, max_born: int) -> Iterator[tuple[Evidence, Snapshot]]:
    """Yield everything that agents could report next."""
    job, attempt = now.job, now.job.attempt
    ended = now.job.finish is not None
    if now.num_born < max_born:
        for agent in range(len(job.procs)):
            born = now.num_born + 1
            ready = Ready(attempt=attempt, agent=agent, worker_id=born, address="")
            yield ready, replace(now, living=now.living | {born}, num_born=born)
    members = [m for m in (*job.seats, *job.ready) if m is not None]
    for member in members:
        for exit_code in (KILLED, RAISED, LEFT):
            yield (
                Exited(
                    attempt=attempt,
                    agent=member.agent,
                    worker_id=member.worker_id,
                    exit_code=exit_code,
                ),
                replace(now, living=now.living - {member.worker_id}),
            )
    for rank, seat in enumerate(job.seats):
        if seat is not None and job.epoch and not ended:
            for kind in (SetupLogged, Protected, Done):
                yield kind(attempt=attempt, rank=rank), now
            lost = (rank + 1) % len(job.seats)
            link = LinkLost(attempt=attempt, rank=rank, lost_rank=lost, epoch=job.epoch)
            yield link, now
            device = DeviceLost(
                attempt=attempt, rank=rank, epoch=job.epoch, reason="an error"
            )
            yield device, now
    yield GraceOver(epoch=job.epoch), now


def check(before: Snapshot, after: Snapshot, decisions: tuple[Decision, ...]) -> None:
    """The promises of the rule, for one step of it."""
    old, new = before.job, after.job
    assert new.epoch >= old.epoch and new.attempt >= old.attempt
    if old.finish is not None:
        assert new == old and decisions == ()
        return
    assert len(decisions) <= 1
    seated = [m.worker_id for m in new.seats if m is not None]
    spare = [m.worker_id for m in new.ready]
    assert len(set(seated + spare)) == len(seated + spare)
    for decision in decisions:
        if isinstance(decision, Membership):
            check_membership(old, after, decision)
        elif isinstance(decision, Restart):
            assert decision.attempt == new.attempt == old.attempt + 1
        else:
            assert new.finish == decision
    if not any(isinstance(decision, Restart) for decision in decisions):
        assert set(seated + spare) <= after.living
    if new.finish is None and new.broken:  # nobody waits for what is there
        vacant = [r for r, m in enumerate(new.seats) if m is None]
        needed = [new.owner(rank) for rank in vacant]
        there = [m.agent for m in new.ready]
        assert any(needed.count(agent) > there.count(agent) for agent in needed)
    if new.max_restarts is not None:
        assert new.attempt <= new.max_restarts
        if new.finish is None:
            assert new.attempt + new.recoveries <= new.max_restarts


def check_membership(old: Job, after: Snapshot, new: Membership) -> None:
    assert new.epoch == old.epoch + 1 == after.job.epoch
    assert len(new.members) == len(old.seats)
    for rank, member in enumerate(new.members):
        assert member.worker_id in after.living
        assert member.agent == old.owner(rank)
        former = old.seats[rank]
        if former is not None and former.worker_id in after.living:
            assert member == former  # survivors keep their rank
    assert Membership.from_json(new.to_json()) == new


def step(now: Snapshot, evidence: Evidence, truth: Snapshot) -> Snapshot:
    job, decisions, reason = apply(now.job, evidence)
    after = replace(truth, job=job)
    assert reason
    check(now, after, decisions)
    if any(isinstance(decision, Restart) for decision in decisions):
        after = replace(after, living=frozenset())
    return after


@pytest.mark.parametrize(
    ("procs", "protected", "max_born", "depth"),
    [
        ((1,), False, 4, 7),
        ((2,), False, 3, 5),
        ((2,), True, 5, 6),
        ((1, 1), True, 4, 6),
        ((2, 1), True, 5, 5),
    ],
)
@pytest.mark.parametrize("max_restarts", [None, 1])
def test_all_small_worlds_keep_the_promises(
    procs: tuple[int, ...],
    protected: bool,
    max_born: int,
    depth: int,
    max_restarts: int | None,
) -> None:
    world = World(*procs, max_restarts=max_restarts)
    if protected:
        world.fill()
        world.protect()
    living = frozenset(range(1, world.last_id + 1))
    start = Snapshot(world.job, living, world.last_id)
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        now, length = queue.popleft()
        if length == depth:
            continue
        for evidence, truth in possible(now, max_born):
            after = step(now, evidence, truth)
            if after not in seen:
                seen.add(after)
                queue.append((after, length + 1))
    assert len(seen) > 100


@pytest.mark.parametrize("seed", range(20))
def test_long_random_stories_keep_the_promises(seed: int) -> None:
    rng = random.Random(seed)
    procs = tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 3)))
    now = Snapshot(new_job(procs, rng.choice([None, 5])), frozenset())
    for _ in range(500):
        options = list(possible(now, max_born=300))
        # Without more births than deaths most stories would end in a wait.
        births = [o for o in options if isinstance(o[0], Ready)]
        evidence, truth = rng.choice(
            births if births and rng.random() < 0.3 else options
        )
        now = step(now, evidence, truth)


# --- on the wire ------------------------------------------------------------------


def test_evidence_and_decisions_survive_the_wire() -> None:
    member = Member(7, 0, "address")
    for message in (
        Ready(attempt=1, agent=2, worker_id=3, address="x"),
        Exited(
            attempt=0, agent=0, worker_id=1, exit_code=-9, traceback="t", fatal=True
        ),
        LinkLost(attempt=0, rank=1, lost_rank=2, epoch=3),
        DeviceLost(attempt=0, rank=1, epoch=3, reason="an error"),
        Stop(signal=15),
        Membership(4, (member,)),
        Restart(attempt=1, reason="r"),
        Finish(exit_code=1, reason="r", rank=2, worker_id=3),
    ):
        assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"epoch": 1},
        {"epoch": 0, "members": [{"worker_id": 1, "agent": 0, "address": ""}]},
        {"epoch": True, "members": [{"worker_id": 1, "agent": 0, "address": ""}]},
        {"epoch": 1, "members": []},
        {"epoch": 1, "members": "ab"},
        {"epoch": 1, "members": [{"worker_id": 1, "agent": 0}]},
        {"epoch": 1, "members": [{"worker_id": "1", "agent": 0, "address": ""}]},
        {"epoch": 1, "members": [{"worker_id": 1, "agent": 0, "address": ""}] * 2},
        {"epoch": 1, "members": [{"worker_id": 1, "agent": 0, "address": ""}], "x": 1},
    ],
)
def test_a_malformed_membership_is_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        Membership.from_json(value)


@pytest.mark.parametrize(
    "value", [{}, {"kind": "Nope"}, {"kind": "Stop"}, {"kind": "Stop", "sig": 1}]
)
def test_malformed_evidence_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        decode(value)
