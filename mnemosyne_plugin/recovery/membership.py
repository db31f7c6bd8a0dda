"""Who sits on which rank: the leader's rule, a pure function of the evidence.

``apply(job, evidence)`` is the whole of it. No I/O and no clock: that a grace
period is over is evidence like any other (``GraceOver``).
"""

from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any, TypeVar

from mnemosyne_plugin.errors import ConfigError

SETUP_RESTARTS = 3
"""Restarts after deaths by signal in set-up, unless --max-restarts says else.
A machine may kill a worker that is out of memory once; three times is no accident."""

_REPLACE = (
    "a new worker could not use this device either; take it out of service, or its "
    "node, and start the job again"
)

STILLBORN_LIMIT = 3
"""Workers of one agent that may die in a row before one of them is ready."""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that holds a rank, or may be given one."""

    worker_id: int
    agent: int
    address: str


@dataclass(frozen=True, slots=True)
class Membership:
    """Rank -> worker for all ranks; the index is the rank."""

    epoch: int
    members: tuple[Member, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Any) -> "Membership":
        """Read what ``to_json`` wrote; ConfigError if it is anything else."""
        if not isinstance(value, dict) or set(value) != {"epoch", "members"}:
            raise ConfigError(f"membership must have epoch and members, got {value!r}")
        if type(value["epoch"]) is not int or value["epoch"] < 1:
            raise ConfigError(f"epoch must be at least 1, got {value['epoch']!r}")
        if not isinstance(value["members"], list | tuple) or not value["members"]:
            raise ConfigError(f"members must be a list, got {value['members']!r}")
        members = tuple(_member(item) for item in value["members"])
        if len({m.worker_id for m in members}) != len(members):
            raise ConfigError("a worker is on two ranks")
        return Membership(value["epoch"], members)


def _member(value: Any) -> Member:
    types = {"worker_id": int, "agent": int, "address": str}
    if not isinstance(value, dict) or set(value) != set(types):
        raise ConfigError(f"member must have {', '.join(types)}, got {value!r}")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise ConfigError(f"{name} must be {kind.__name__}, got {value[name]!r}")
    return Member(**value)


class Cure(str, Enum):
    """What helps a rank whose device has failed; a string, so that it travels."""

    NONE = ""
    """It has not, or is as good as before."""
    USER = "user"
    """Out of memory: a new worker would be, too."""
    PROCESS = "process"
    """Every call fails from now on; a new process is as good as new."""
    HARDWARE = "hardware"
    """The same, and the hardware has told of a defect: it may be contained, once."""
    DEVICE = "device"
    """A new process cannot use this device either."""


# Evidence: what agents saw. `attempt` counts whole-job restarts; evidence about
# an attempt that is over is ignored.


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A worker's mesh listens; it may be seated."""

    attempt: int
    agent: int
    worker_id: int
    address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """A worker is gone. exit_code: as subprocess has it, -N for signal N."""

    attempt: int
    agent: int
    worker_id: int
    exit_code: int
    traceback: str = ""
    fatal: bool = False
    """The worker met an error that no new worker can mend."""
    is_state_lost: bool = False
    """The error was that nobody holds the job's state any more."""
    step: int = -1
    """That the worker was in."""
    cure: str = Cure.NONE
    device_error: str = ""
    """Which device has failed, and how; "": none has."""

    @property
    def is_death(self) -> bool:
        """Whether it was none of the script's doing, as far as one can tell."""
        return self.exit_code < 0 or self.cure in (Cure.PROCESS, Cure.HARDWARE)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkLost:
    """The mesh of `rank` latched a failure of its link to `lost_rank`."""

    attempt: int
    rank: int
    lost_rank: int
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLost:
    """The device of `rank` is lost; its worker lives, and repairs it."""

    attempt: int
    rank: int
    epoch: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SetupLogged:
    """The set-up of this rank is done, and can be replayed for a newcomer."""

    attempt: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Protected:
    """The job's state is attached on this rank."""

    attempt: int
    rank: int
    may_restart: bool = False
    """The job shall start again where its state is lost: it loads a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The script of this rank ended well; its worker lingers."""

    attempt: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GraceOver:
    """Nobody reported an exit in the grace period after a lost link."""

    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentLost:
    """An agent, and so all its workers, is gone or cannot do its work."""

    agent: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """An agent was told to stop by a signal."""

    signal: int


Evidence = (
    Ready
    | Exited
    | LinkLost
    | DeviceLost
    | SetupLogged
    | Protected
    | Done
    | GraceOver
    | AgentLost
    | Stop
)


# Decisions: what agents do. A Membership is one too.


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """Replace every worker; nobody's state is kept."""

    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """End the job on all agents."""

    exit_code: int
    reason: str
    rank: int = -1
    """The rank whose worker ended the job, or -1."""
    worker_id: int = -1


Decision = Membership | Restart | Finish

_MESSAGES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Ready, Exited, LinkLost, DeviceLost, SetupLogged, Protected, Done),
        *(AgentLost, Stop, Restart, Finish),
    )
}


def encode(message: Evidence | Restart | Finish | Membership) -> dict[str, Any]:
    """Return evidence or a decision as JSON values."""
    if isinstance(message, Membership):
        return {"kind": "Membership", **message.to_json()}
    return {"kind": type(message).__name__, **asdict(message)}


def decode(value: dict[str, Any]) -> Any:
    """Read what ``encode`` wrote."""
    facts = dict(value)
    kind = facts.pop("kind", None)
    if kind == "Membership":
        return Membership.from_json(facts)
    cls = _MESSAGES.get(kind)
    if cls is None or not set(facts) <= {f.name for f in fields(cls)}:
        raise ConfigError(f"unknown evidence or decision: {value!r}")
    try:
        return cls(**facts)
    except TypeError as error:
        raise ConfigError(f"malformed {kind}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All that the leader knows."""

    procs: tuple[int, ...]
    """Number of ranks of each agent; its ranks are consecutive."""
    max_restarts: int | None = None
    """--max-restarts; None: deaths by signal in training are mended for ever."""
    attempt: int = 0
    epoch: int = 0
    seats: tuple[Member | None, ...] = ()
    ready: tuple[Member, ...] = ()
    """Living workers without a rank, longest ready first."""
    broken: bool = True
    """A new membership is due as soon as all seats can be filled."""
    suspected: bool = False
    """A link broke in this epoch; its cause may still be reported."""
    lost_device: str = ""
    """Which device was lost in this epoch, in words."""
    logged: frozenset[int] = frozenset()
    protected: frozenset[int] = frozenset()
    done: frozenset[int] = frozenset()
    may_restart: bool = False
    """The user wants a restart where the state is lost."""
    newcomers: frozenset[int] = frozenset()
    """Ranks seated in training that did not report their state as attached yet."""
    raised: frozenset[int] = frozenset()
    """Ranks that were recovered from an exception once."""
    broken_in: frozenset[tuple[int, int]] = frozenset()
    """Rank and step of each error after which a device was used by a new process."""
    defective: frozenset[int] = frozenset()
    """Ranks whose devices have told of a defect once."""
    recoveries: int = 0
    stillborn: tuple[int, ...] = ()
    finish: Finish | None = None
    cause: Exited | None = None
    """The first exception since the last membership, or None."""

    def owner(self, rank: int) -> int:
        """Return the agent of this rank."""
        for agent, count in enumerate(self.procs):
            if rank < count:
                return agent
            rank -= count
        raise IndexError(f"no rank {rank}")


def new_job(procs: tuple[int, ...], max_restarts: int | None = None) -> Job:
    """Return a job whose seats are all vacant."""
    return Job(
        procs=procs,
        max_restarts=max_restarts,
        seats=(None,) * sum(procs),
        stillborn=(0,) * len(procs),
    )


Verdict = tuple[Job, tuple[Decision, ...], str]
"""The new state, what to do, and why."""


def apply(job: Job, evidence: Evidence) -> Verdict:
    """Return what follows from one more piece of evidence."""
    if job.finish or getattr(evidence, "attempt", job.attempt) != job.attempt:
        return job, (), "too late"
    match evidence:
        case Ready():
            return _ready(job, evidence)
        case Exited():
            return _exited(job, evidence)
        case LinkLost():
            return _link_lost(job, evidence)
        case DeviceLost(rank=rank, reason=reason):
            if evidence.epoch != job.epoch or job.broken:
                return job, (), "known already"
            what = f"rank {rank} lost its device ({reason})"
            return _mend_device(replace(job, lost_device=what))
        case GraceOver(epoch=epoch):
            if not job.suspected or epoch != job.epoch:
                return job, (), "the cause was found"
            return _recover(job, "a link broke between living workers")
        case SetupLogged(rank=rank):
            return _mend_device(replace(job, logged=job.logged | {rank}))
        case Protected(rank=rank, may_restart=may_restart):
            protected, newcomers = job.protected | {rank}, job.newcomers - {rank}
            job = replace(job, protected=protected, newcomers=newcomers)
            return _mend_device(replace(job, may_restart=may_restart))
        case Done(rank=rank):
            return _done(replace(job, done=job.done | {rank}))
        case AgentLost(agent=agent, reason=why):
            return _finish(job, 3, f"agent {agent}: {why}")
        case Stop(signal=number):
            return _finish(job, 128 + number, f"stopped by signal {number}")
        case _:
            raise ConfigError(f"no rule for {evidence!r}")


def _ready(job: Job, evidence: Ready) -> Verdict:
    member = Member(evidence.worker_id, evidence.agent, evidence.address)
    if any(m and m.worker_id == member.worker_id for m in job.seats + job.ready):
        return job, (), "known already"
    stillborn = _put(job.stillborn, member.agent, 0)
    return _seat(replace(job, ready=(*job.ready, member), stillborn=stillborn))


def _seat(job: Job) -> Verdict:
    """Fill vacant seats, each from its own agent; publish once all are filled."""
    if not job.broken:
        return job, (), "nothing to mend"
    seats, ready = list(job.seats), list(job.ready)
    vacant = [rank for rank, member in enumerate(seats) if member is None]
    for rank in vacant:
        spare = next((m for m in ready if m.agent == job.owner(rank)), None)
        if spare is None:
            return job, (), f"rank {rank} waits for a worker of agent {job.owner(rank)}"
        seats[rank] = spare
        ready.remove(spare)
    members = tuple(member for member in seats if member is not None)
    job = replace(
        job,
        epoch=job.epoch + 1,
        seats=members,
        ready=tuple(ready),
        broken=False,
        suspected=False,
        lost_device="",
        # A rank that ended and left is run again: the job needs all seats.
        done=job.done - set(vacant),
        newcomers=job.newcomers | (set(vacant) if _in_training(job) else set()),
        cause=None,
    )
    return job, (Membership(job.epoch, members),), f"seated ranks {vacant}"


def _exited(job: Job, evidence: Exited) -> Verdict:
    rank = _rank_of(job, evidence.worker_id)
    if rank is None:
        return _unseated_exited(job, evidence)
    what = f"rank {rank} {_how(evidence.exit_code)}"
    if evidence.device_error:
        what += f" ({evidence.device_error})"
    job = replace(job, seats=_put(job.seats, rank, None))
    if evidence.is_state_lost and job.may_restart:
        return _restart(job, what, _restart_limit(job), rank, evidence)
    if evidence.cure == Cure.USER and not evidence.fatal:
        return _finish(job, 1, f"{what}: out of memory", rank, evidence)
    if evidence.cure == Cure.DEVICE or (
        evidence.cure == Cure.HARDWARE and rank in job.defective
    ):
        return _finish(job, 3, f"{what}: {_REPLACE}", rank, evidence)
    if evidence.cure == Cure.HARDWARE:
        job = replace(job, defective=job.defective | {rank})
    if evidence.fatal:
        return _finish(job, 3, f"{what}: no new worker can mend this", rank, evidence)
    if evidence.exit_code == 0:
        return _done(replace(job, done=job.done | {rank}))
    job = replace(job, done=job.done - {rank}, newcomers=job.newcomers - {rank})
    if not _in_training(job):
        return _lost_before_training(job, what, rank, evidence)
    return _lost_in_training(job, what, rank, evidence)


def _unseated_exited(job: Job, evidence: Exited) -> Verdict:
    ready = tuple(m for m in job.ready if m.worker_id != evidence.worker_id)
    if len(ready) < len(job.ready):
        return replace(job, ready=ready), (), "a standby is gone"
    agent = evidence.agent
    deaths = job.stillborn[agent] + 1
    job = replace(job, stillborn=_put(job.stillborn, agent, deaths))
    if deaths < STILLBORN_LIMIT:
        return job, (), "a worker died before it was ready"
    reason = f"{deaths} workers of agent {agent} died before they were ready"
    return _finish(job, 3, reason, -1, evidence)


def _lost_before_training(job: Job, what: str, rank: int, dead: Exited) -> Verdict:
    # Where some ranks are protected, the others are about to be.
    in_setup = len(job.logged) < len(job.seats) or bool(job.protected)
    limit = job.max_restarts or 0
    if in_setup and dead.is_death:
        limit = _restart_limit(job)
    if in_setup:
        return _restart(job, f"{what} in set-up", limit, rank, dead)
    what += " in a job that nothing protects"
    if job.attempt < limit:
        return _restart(job, what, limit, rank, dead)
    advice = "add a mnemosyne section to ds_config, or call mnemosyne_plugin.attach"
    return _finish(job, 1, f"{what}; {advice}", rank, dead)


def _restart_limit(job: Job) -> int:
    return SETUP_RESTARTS if job.max_restarts is None else job.max_restarts


def _restart(job: Job, what: str, limit: int, rank: int, dead: Exited) -> Verdict:
    """Start the whole job again, or end it if that was done ``limit`` times."""
    if job.attempt >= limit:
        return _finish(job, 3 if dead.is_state_lost else 1, what, rank, dead)
    attempt = job.attempt + 1
    reason = f"{what}; restart {attempt} of {limit}"
    fresh = replace(new_job(job.procs, job.max_restarts), epoch=job.epoch)
    return (
        replace(fresh, attempt=attempt, defective=job.defective),
        (Restart(attempt=attempt, reason=reason),),
        reason,
    )


def _lost_in_training(job: Job, what: str, rank: int, dead: Exited) -> Verdict:
    if dead.cure in (Cure.PROCESS, Cure.HARDWARE):
        if (rank, dead.step) in job.broken_in:
            again = f"{what} again in step {dead.step}; does a kernel break it there?"
            return _finish(job, 1, again, rank, dead)
        broken_in = job.broken_in | {(rank, dead.step)}
        job = replace(job, broken_in=broken_in, cause=job.cause or dead)
    elif dead.exit_code > 0:
        if rank in job.raised:
            return _finish(job, 1, f"{what} again after its recovery", rank, dead)
        raised = job.raised | {rank}
        job = replace(job, raised=raised, cause=job.cause or dead)
    if all(m is None or r in job.newcomers for r, m in enumerate(job.seats)):
        cause = job.cause or dead
        what = f"{what}; nobody is left who holds state"
        if job.may_restart and cause.is_death:
            lost = replace(cause, is_state_lost=True)
            return _restart(job, what, _restart_limit(job), rank, lost)
        return _finish(job, 1 if cause.exit_code > 0 else 3, what, rank, cause)
    return _recover(job, what)


def _recover(job: Job, reason: str) -> Verdict:
    """Count one more recovery, and start it."""
    recoveries = job.recoveries + 1
    limit = job.max_restarts
    if limit is not None and job.attempt + recoveries > limit:
        return _finish(job, 1, f"{reason}; --max-restarts {limit} is used up")
    job, decisions, seated = _seat(replace(job, recoveries=recoveries, broken=True))
    return job, decisions, f"{reason}; {seated}"


def _link_lost(job: Job, evidence: LinkLost) -> Verdict:
    if evidence.epoch != job.epoch or job.broken or not _in_training(job):
        return job, (), "known already, or for the script to see"
    return replace(job, suspected=True), (), "a link is lost; its end may be reported"


def _mend_device(job: Job) -> Verdict:
    """Start the recovery of a lost device, once all ranks can take part."""
    if not job.lost_device or job.broken or not _in_training(job):
        return job, (), job.lost_device or "one more rank is ready"
    return _recover(job, job.lost_device)


def _done(job: Job) -> Verdict:
    if len(job.done) < len(job.seats):
        return job, (), "other ranks are not done"
    return _finish(job, 0, "all ranks are done")


def _finish(
    job: Job, code: int, reason: str, rank: int = -1, dead: Exited | None = None
) -> Verdict:
    worker_id = dead.worker_id if dead else -1
    finish = Finish(exit_code=code, reason=reason, rank=rank, worker_id=worker_id)
    return replace(job, finish=finish), (finish,), reason


def _in_training(job: Job) -> bool:
    return len(job.logged) == len(job.protected) == len(job.seats)


def _rank_of(job: Job, worker_id: int) -> int | None:
    for rank, member in enumerate(job.seats):
        if member and member.worker_id == worker_id:
            return rank
    return None


def _how(exit_code: int) -> str:
    if exit_code < 0:
        return f"was killed by signal {-exit_code}"
    return f"ended with exit code {exit_code}"


_T = TypeVar("_T")


def _put(items: tuple[_T, ...], index: int, item: _T) -> tuple[_T, ...]:
    return (*items[:index], item, *items[index + 1 :])
