"""Per rank: drives the step's commit, and the recovery when it fails.

RUNNING > FENCED > RECONFIGURING > RESTORING > RUNNING; a failure in any of them goes
back to FENCED under a newer epoch. All methods run on the main thread.
"""

import base64
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mnemosyne_plugin import ccl
from mnemosyne_plugin.ccl.devices import are_named, find_devices
from mnemosyne_plugin.ccl.graphs import Graphs
from mnemosyne_plugin.ccl.intercept import group_ids, serve_process_groups
from mnemosyne_plugin.config import DeviceProxyConfig
from mnemosyne_plugin.errors import (
    ConfigError,
    FatalError,
    NoSourceForState,
    OutOfDeviceMemory,
    PeerLost,
    RecoverableError,
    StateMismatch,
)
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.proxy import DeviceProxy
from mnemosyne_plugin.recovery import device_errors
from mnemosyne_plugin.recovery.agent_link import AgentLink
from mnemosyne_plugin.recovery.channel import Channel
from mnemosyne_plugin.recovery.commit import Decision, Outcome, Report, decide
from mnemosyne_plugin.recovery.control import ControlGroup
from mnemosyne_plugin.recovery.device import Device
from mnemosyne_plugin.recovery.device_groups import DeviceGroups
from mnemosyne_plugin.recovery.membership import Cure, Membership
from mnemosyne_plugin.recovery.protection import Position, Protection
from mnemosyne_plugin.state.image import Shard
from mnemosyne_plugin.state.manifest import TrainingState
from mnemosyne_plugin.state.rng import capture_rng
from mnemosyne_plugin.state.snapshot import Footprint

logger = logging.getLogger(__name__)

_NUM_BUDDIES = 2  # without shards: a rank and its neighbour may be lost at once
_MAX_VAIN = 4  # repairs of a job that has not come further, with nobody lost
_MAX_LOSSES = 20  # of one rank's device in the same step
_TIMEOUT_S = 1800.0  # longest recovery: a fresh worker may be starting


class State(Enum):
    """What this rank is busy with."""

    RUNNING = "running"
    FENCED = "fenced"
    RECONFIGURING = "reconfiguring"
    RESTORING = "restoring"


@dataclass(frozen=True, slots=True)
class Seat:
    """What the agent gives to a worker that takes a rank."""

    rank: int
    membership: Membership
    setup_log: bytes | None
    """The set-up log of the rank's first worker; None for that one itself."""


class Manager:
    """The recovery runtime of one rank."""

    def __init__(
        self,
        *,
        mesh: ccl.Mesh,
        channel: Channel,
        seat: Seat,
        events: EventLog,
        on_phase: Callable[[int, str, int], None] | None = None,
        proxy: DeviceProxy | None = None,
    ) -> None:
        """Take the seat; ``start`` joins the job.

        proxy: the device proxy that this process was started with.
        on_phase(rank, phase, step) is called at the begin of each phase of a step.
        """
        self.mesh = mesh
        self.rank = seat.rank
        self.world_size = len(seat.membership.members)
        self.version = 0
        self._events = events
        if are_named():
            proxy = None  # a worker that loses its device is replaced
        devices = find_devices(has_proxy=proxy is not None)
        self._device = Device(proxy, mesh, seat.rank, events) if proxy else None
        look = self._device.look if self._device is not None else lambda: None
        self._groups: DeviceGroups | None = None
        if devices is not None:
            graphs = Graphs(mesh)
            graphs.watch()
            self._groups = DeviceGroups(
                devices, mesh, seat.rank, events, look, graphs=graphs
            )
        self._agent = AgentLink(
            mesh,
            channel,
            seat.rank,
            seat.membership,
            events,
            self._device,
            self._groups,
        )
        self._on_phase = on_phase
        self._setup_log = seat.setup_log
        self._is_setting_up = True
        self._is_newcomer = seat.setup_log is not None
        self._has_voted = False
        self.is_ahead = False
        """In a step that the others have made: their state is here, mutate nothing."""
        self._losses = (-1, 0)  # the device's last one: in which step, the n-th there
        self._state = State.RUNNING
        self._protection: Protection | None = None
        self._is_first_step = self._is_newcomer
        self.nodes = [member.agent for member in seat.membership.members]
        """The node that each rank is on."""
        self._redo: Callable[[], None] | None = None
        self._on_footprint: Callable[[Footprint], None] | None = None
        self._has_told_footprint = False
        self._has_told_protection = False
        self._furthest = 0
        self.horizon = 0
        """Steps before this one are never made again."""
        self.saved = (-1, 0)
        """The last checkpoint in place: made at which version, the n-th there."""
        self._checkpoint = ""
        self.no_checkpoint = "none was saved or loaded in this run"
        """What a job that needs one says where there is none."""
        self.on_stop: Callable[[], None] | None = None
        """Called in front of a step on all ranks, if the job is to save and to end."""
        self.owed: Mapping[str, Any] = {}
        """What the others load in front of a version that this rank is to load too."""
        self._loading: Mapping[str, Any] = {}
        self._is_stopping = False
        self._passed_version = -1
        self.furthest_of_all = -1
        """The newest version that any rank had come to when a failure was seen."""
        self._speakers = set(range(self.world_size))
        self._place = (-1, -1)  # where the last recovery found the job
        self._num_vain = 0
        self._failure: Exception | None = None

    # --- set-up -------------------------------------------------------------------

    @property
    def is_setting_up_alone(self) -> bool:
        """True while a newcomer runs the script's set-up without the others."""
        return self._setup_log is not None and self._is_setting_up

    @property
    def is_setting_up(self) -> bool:
        """True until the first step begins."""
        return self._is_setting_up

    def start(self) -> None:
        """Join the mesh, and record the set-up or replay that of the dead worker."""
        self.mesh.lock_membership()  # its epochs are the leader's
        self._agent.reconfigure(self._agent.membership)
        self._control = ControlGroup(self.mesh, self.world_size)
        if self._setup_log is None:
            self.mesh.start_recording()
        else:
            self.mesh.start_replay(self._setup_log)
        devices = self._groups.devices if self._groups is not None else None
        ccl.register(lambda: self.mesh, lambda: self.is_setting_up_alone, devices)
        serve_process_groups(lambda: self.is_setting_up_alone, devices is not None)
        self._agent.start()

    def attach(
        self,
        training: TrainingState,
        position: Position | None,
        shard: Shard | None = None,
        *,
        redo: Callable[[], None] | None = None,
        num_buddies: int = 1,
        snapshot_every: int = 1,
        on_footprint: Callable[[Footprint], None] | None = None,
        may_restart: bool = False,
    ) -> None:
        """Protect this state. On a newcomer it returns with the job's state in place.

        Called by an adapter when the script has built everything, before its first
        step. Raises FatalError if nobody holds the state.

        shard: what only this rank has; its buddies keep snapshots of it.
        redo: makes the steps from ``version`` on again, where the job went back.
        on_footprint: called once, when a snapshot of a made step is where it belongs.
        may_restart: where nobody holds the state any more, all starts again.
        """
        if self._protection is not None:
            raise FatalError("one training state per process can be protected")
        self._protection = Protection(
            training,
            position,
            shard,
            rank=self.rank,
            nodes=self.nodes,
            # What loses a shard loses the job: packs need not live longer.
            num_buddies=_NUM_BUDDIES if shard is None else num_buddies,
            snapshot_every=snapshot_every,
            control=self._control,
        )
        self._redo = redo
        self._on_footprint = on_footprint
        self._may_restart = may_restart
        if self._is_newcomer or self._protection.is_in_place:
            self._tell_protection()
        self._agent.send("modules", names=list(sys.modules))
        if self._is_newcomer:
            self._events.emit("setup_done", epoch=self.mesh.epoch, rank=self.rank)
            self._recover()

    # --- one step -----------------------------------------------------------------

    def phase(self, name: str) -> None:
        """Note that this rank enters a phase of step number ``version``."""
        if self._on_phase is not None:
            self._on_phase(self.rank, name, self.version)

    @property
    def has_failed(self) -> bool:
        """Whether a failure is latched: what the step has computed may be wrong."""
        if self._device is not None:
            self._device.look()
        return self.mesh.failure() is not None

    @property
    def is_doomed(self) -> bool:
        """Whether the failure is one that a recovery mends.

        Where ranks disagree on an operation it is not: that is the script's error.
        """
        return self.has_failed and isinstance(self.mesh.failure(), RecoverableError)

    @property
    def has_device_proxy(self) -> bool:
        """Whether the device may be lost without this process."""
        return self._device is not None

    def refuse_device_proxy(self, trainer: str) -> None:
        """Raise ConfigError if there is one: this trainer cannot lose its device."""
        if self._device is not None:
            raise ConfigError(
                f"this version cannot protect {trainer} under --device-proxy, only "
                "plain DDP with mnemosyne_plugin.attach, DeepSpeed with ZeRO 0 to 2, "
                "and megatron.core in fp32 or bf16; leave the option out"
            )

    def configure_device_proxy(self, config: DeviceProxyConfig | None) -> None:
        """Take what the script's config says of it; None: it says nothing.

        Raises ConfigError where that and how this process was started differ.
        """
        if config is None:
            return
        if config.enabled and self._device is None:
            raise ConfigError(
                "mnemosyne.device_proxy is enabled, but this process runs without it; "
                "start the job by `mnemosyne run --device-proxy`, or name ds_config "
                "by --deepspeed_config in the script's arguments"
            )
        if self._device is None:
            return
        if not config.enabled:
            raise ConfigError(
                "mnemosyne.device_proxy.enabled is false, but this process runs under "
                "the device proxy; leave --device-proxy out, or set it to true"
            )
        if config.timeout_s is not None:
            self._device.proxy.propose_timeout(config.timeout_s)

    def _is_mended(self, error: RuntimeError) -> bool:
        """Whether a recovery mends what has raised ``error``."""
        if isinstance(error, RecoverableError | FatalError):
            return isinstance(error, RecoverableError)
        return self.is_device_lost and self.has_failed  # from now on all know

    def wait_for_device(self) -> None:
        """Wait for all that devices were given.

        Behind it ``has_failed`` tells whether that has happened.
        """
        if self._device is not None:
            self._device.wait()
        elif self._groups is not None:
            self._groups.wait()
        if self._groups is not None:
            self._groups.look()

    def describe_device(self) -> str:
        """Return a line that says what the device proxy is doing; "" without one."""
        return self._device.describe() if self._device is not None else ""

    @property
    def is_device_lost(self) -> bool:
        """Whether it is now."""
        return self._device is not None and self._device.proxy.is_lost

    @property
    def device_generation(self) -> int:
        """How many servers the device proxy has had; another one holds nothing."""
        return self._device.proxy.generation if self._device is not None else 0

    @property
    def is_speaker(self) -> bool:
        """Whether this rank prints what concerns all; another one does if that died."""
        failure = self.mesh.failure()
        lost = {failure.rank} if isinstance(failure, PeerLost) else set()
        living = self._speakers - lost or set(range(self.world_size)) - lost
        return self.rank == min(living)

    @property
    def has_snapshots(self) -> bool:
        """Whether snapshots of earlier steps are what a recovery goes back to."""
        protection = self._protection
        return (
            protection is not None and protection.is_sharded and protection.is_in_place
        )

    @property
    def checkpoint(self) -> str:
        """The folder of the newest checkpoint that the script has saved or loaded."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, folder: str) -> None:
        if folder != self._checkpoint:
            self._checkpoint = folder
            # It names it if the job cannot go on.
            self._agent.send("checkpoint", folder=folder)

    def barrier(self) -> None:
        """Wait for all ranks; never absorbed."""
        self._control.minimum(0)

    def has_passed(self, save: tuple[int, int]) -> bool:
        """Whether the job is past a checkpoint: saved, or never to be saved.

        Behind a recovery the scripts of newcomers call what the others have called
        already, or do not call what the others are in. All ranks skip just that.
        """
        return save <= self.saved or save[0] <= self._passed_version

    def load(
        self,
        call: Callable[[], None],
        what: Mapping[str, Any],
        catch_up: Callable[[], Any],
    ) -> None:
        """Have ``call`` change the shards of all ranks, between two steps. Collective.

        It leads to a version of its own, which all buddies have when this returns. If
        a worker dies in it, all go back and call it again; a newcomer is told ``what``.

        what: JSON values that say how to load the same. catch_up: calls ``recover``,
        and makes the steps from there on again.
        """
        before = self.version
        self._loading = {**what, "version": before}
        try:
            while self.version == before:
                try:
                    self._load(call)
                except Exception:
                    if not self.has_failed:
                        raise
                    catch_up()
        finally:
            self._loading = {}
        self.owed = {}

    def _load(self, call: Callable[[], None]) -> None:
        failure = self.mesh.failure()
        if failure is not None:
            raise failure
        protection = self._protected()
        if not self.is_setting_up_alone:
            protection.begin(self.version)
        protection.begin_load(self.version)
        self._agree_to_load()
        self.phase("load")
        protection.is_clean = False
        self.mesh.hold_replay(True)
        try:
            call()
        finally:
            self.mesh.hold_replay(False)
        self.phase("loaded")
        self.version += 1
        self._furthest = max(self._furthest, self.version)
        protection.end_load(self.version)
        protection.settle(self.version)
        self._agree_to_load()

    def begin(self) -> Outcome:
        """Begin step number ``version``: from here to ``end`` failures are absorbed.

        REDO: the job went back; make the steps from ``version`` on again, and call
        ``begin`` again.
        """
        self.phase("between")
        self._protected().catch_up()
        self.end_setup()
        if self._is_stopping and self.on_stop is not None:
            self.on_stop()
        while True:
            try:
                self._begin()
                return Outcome.COMMIT
            except RuntimeError as error:
                if not self._is_mended(error):
                    raise
                before = self.version
                self._recover()
                if self.version < before:
                    self._emit_redo()
                    return Outcome.REDO

    def _begin(self) -> None:
        failure = self.mesh.failure()
        if failure is not None:
            raise failure
        protection = self._protected()
        if self.owed.get("version") == self.version:
            raise FatalError(
                f"a worker was lost when all ranks were to load {self.owed}, and the "
                f"script of rank {self.rank}, which another worker runs now, goes on "
                "without that; start the job again from that checkpoint"
            )
        protection.begin(self.version)
        if not self._has_told_protection:
            self._tell_protection()
        self.mesh.absorb(True)

    def _protected(self) -> Protection:
        if self._protection is None:
            raise FatalError("a worker was lost before the job was protected")
        return self._protection

    def _tell_protection(self) -> None:
        self._has_told_protection = True
        self._agent.send("protected", may_restart=self._may_restart)

    def commit(self) -> Outcome:
        """Vote, in front of the first mutation; all reductions are done.

        COMMIT: mutate now, then call ``end``. REDO: drop the gradients, call
        ``recover``, make the steps from ``version`` on again and call ``commit`` again.
        """
        protection, rng = self._protected(), capture_rng()
        try:
            self.wait_for_device()  # all that the vote is about has happened
            failure = self.mesh.failure()
            if failure is not None:
                raise failure
            is_new = self.version == self._furthest
            protection.prepare(self.version, rng, is_new=is_new)
            if not self._has_told_footprint:
                self._tell_footprint(protection)
            self.phase("vote")
            self._vote()
        except RuntimeError as error:
            if not self._is_mended(error):
                raise
            if protection.is_sharded or self.recover() is Outcome.REDO:
                return Outcome.REDO
            # The others have done this mutation, collectives in it included.
            self.mesh.start_replay(b"")
            rng = capture_rng()
        protection.mutate(rng)
        self.horizon = protection.horizon(self.version)
        self.phase("optimizer")
        return Outcome.COMMIT

    def mutated(self) -> Outcome:
        """Behind a mutation, if ``has_device_proxy``: see that it has happened.

        COMMIT: it has, here or, where the device was lost in it, with the others,
        whose state this rank has now. REDO: as that of ``commit``.
        """
        assert self._device is not None
        self._device.wait()
        if not self._device.proxy.is_lost:
            return Outcome.COMMIT
        self._device.look()
        return self.recover()

    def take_over(self) -> None:
        """Where this rank ``is_ahead``: have the others' counters and schedules, too.

        Else the next ``begin`` does that, because the script still steps them itself.
        """
        self._protected().catch_up()

    def _tell_footprint(self, protection: Protection) -> None:
        footprint = protection.footprint(self.version)
        if footprint is None:
            return
        self._has_told_footprint = True
        fields = {name: getattr(footprint, name) for name in footprint.__slots__}
        self._events.emit(
            "snapshot",
            epoch=self.mesh.epoch,
            rank=self.rank,
            step=protection.horizon(self.version),
            **fields,
        )
        if self._on_footprint is not None:
            self._on_footprint(footprint)

    def collect(self) -> None:
        """Send and take in what is ready, without waiting. Called now and then."""
        try:
            self._protected().collect()
        except RuntimeError as error:
            if not self._is_mended(error):
                raise

    def recover(self) -> Outcome:
        """Repair the job if it has failed; tell what to do with the step in hand.

        REDO, also where nothing has failed: make the steps from ``version`` on.
        """
        if self.has_failed:
            before = self.version
            decision = self._recover()
            self.is_ahead = self.version > before
            if self.is_ahead or decision.outcome(self.rank) is Outcome.COMMIT:
                return Outcome.COMMIT
            self._emit_redo()
        return Outcome.REDO

    def end(self) -> Outcome:
        """End the step: its mutation is done, ``version`` is one more.

        REDO, only with a shard: a failure has spoiled the mutation, or the device was
        lost before its snapshot was whole; ``recover``.
        """
        self.mesh.stop_replay()
        protection = self._protected()
        if protection.is_sharded:
            self.wait_for_device()
            if self.has_failed:
                return Outcome.REDO
        self.mesh.absorb(False)
        if not self.is_ahead:
            self.version += 1
        self.is_ahead = False
        self._furthest = max(self._furthest, self.version)
        self._has_voted = False
        try:
            protection.take(self.version)
        except RuntimeError as error:
            if not self._is_mended(error):
                raise
            return Outcome.REDO
        if self._is_first_step:
            self._is_first_step = False
            self._events.emit(
                "first_step",
                epoch=self.mesh.epoch,
                rank=self.rank,
                step=self.version - 1,
            )
        return Outcome.COMMIT

    def meet(self) -> Outcome:
        """Behind ``end``, with a device proxy: wait until all have ended the step.

        COMMIT: no device that is lost from here on takes the step back, so all do once
        what the script does next, on NCCL's groups too. REDO: ``recover``; the step
        may have to be made again.
        """
        if self._device is not None:
            try:
                self._agree(self.version, is_asked=False)
            except RecoverableError:
                return Outcome.REDO
        return Outcome.COMMIT

    def finish(self) -> None:
        """The script is done: stay as a source of state until all ranks are."""
        if self._protection is not None:
            self._protection.catch_up()
        if self.has_snapshots:
            self._settle()
        self._agent.send("done")
        while (membership := self._agent.wait_for_news(None)) is not None:
            if self._agent.is_finished:
                return
            if self._protection is not None:
                self._recover()
                self._settle()
            else:
                self._agent.reconfigure(membership)

    def _settle(self) -> None:
        """Behind the last step: make again what was lost, and see it kept."""
        while True:
            try:
                if self.version < self._furthest:
                    assert self._redo is not None
                    self._redo()
                self._protected().settle(self.version)
                return
            except RuntimeError as error:
                if not self._is_mended(error):
                    raise
                self._recover()

    def stopped(self) -> None:
        """The job's state is saved by all ranks: wait for the agent to end us."""
        self._agent.send("saved", checkpoint=self.checkpoint)
        while self._agent.wait_for_news(None) is not None:
            pass  # others are ended before us

    def offer_stop(self, call: Callable[[], None]) -> None:
        """Have ``call`` save the state in front of a step, if the job must end."""
        self.on_stop = call
        self._agent.send("can_save")

    def close(self) -> None:
        """Stop the thread. The mesh and the channel belong to the caller."""
        self._agent.close()

    # --- commit and recovery ------------------------------------------------------

    def _vote(self) -> None:
        self._has_voted = True
        is_asked = self._agent.is_stop_asked and self.on_stop is not None
        self._is_stopping = self._agree(self.version, is_asked)

    def _agree_to_load(self) -> None:
        """Wait for all ranks; who is in a step votes for another number."""
        self._agree(-1 - self.version, is_asked=False)

    def _agree(self, number: int, is_asked: bool) -> bool:
        """Wait until all ranks have told ``number``; True if one is asked to stop."""
        lowest, highest, stop = self._control.minimum(number, -number, -int(is_asked))
        highest = -highest
        if lowest < 0 <= highest:
            raise StateMismatch(
                f"some ranks load a checkpoint, others make step {highest}: does "
                "every rank's script, one started anew too, load in front of the same "
                "steps?",
                key="step",
            )
        if lowest != highest:
            raise StateMismatch(
                f"ranks are at different steps ({lowest} to {highest}): does every "
                "rank run the same number of steps?",
                key="step",
            )
        return stop < 0

    def _recover(self) -> Decision:
        """Bring the whole job to one version. Returns when this rank is part of it."""
        self._protected()
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                decision = self._recover_once(deadline)
                self._enter(State.RUNNING)
                self._emit_groups()
                return decision
            except RecoverableError as error:
                logger.info("rank=%d recovery failed: %s; again", self.rank, error)
                if time.monotonic() > deadline:
                    raise FatalError(
                        f"the job could not be repaired in {_TIMEOUT_S:.0f} s: {error}"
                    ) from error
                self._enter(State.FENCED)
            except FatalError:
                raise
            except RuntimeError as error:
                self._check_memory(error)
                # This rank's device, or another's: then NCCL's part is cut short.
                if not (self.has_device_proxy and self.is_doomed):
                    raise
                self._enter(State.FENCED)

    def _check_memory(self, error: BaseException) -> None:
        """Raise OutOfDeviceMemory if that is what it is: each repair would be again."""
        found = device_errors.find(error)
        if found is not None and found.cure is Cure.USER:
            raise OutOfDeviceMemory(
                f"rank {self.rank} ran out of memory on its device in step "
                f"{self.version}, by what NCCL or a repair needs beside the script: "
                f"{error}; leave more of it free"
            ) from error

    def _count_loss(self) -> None:
        """Raise FatalError where the device is lost in the same step for ever."""
        step, count = self._losses
        count = count + 1 if step == self.version else 1
        self._losses = self.version, count
        if count >= _MAX_LOSSES:
            raise FatalError(
                f"rank {self.rank} lost its device {count} times in step "
                f"{self.version}: does a kernel that the script runs there break it? "
                f"The last failure: {self._failure}"
            )

    def _emit_redo(self) -> None:
        self._has_voted = False
        self._events.emit(
            "redo", epoch=self.mesh.epoch, rank=self.rank, step=self.version
        )

    def _recover_once(self, deadline: float) -> Decision:
        failure = self.mesh.failure()
        if failure is not None or self._agent.membership.epoch > self.mesh.epoch:
            self._failure = failure or self._failure
            self._enter(State.FENCED)
            if failure is not None:
                self._check_memory(failure)
            if self._device is None:
                device_errors.look()  # nobody repairs it: this worker is replaced
            elif self._device.recover():
                self._count_loss()
                self._protected().lose_device()
                if self._groups is not None:
                    self._groups.lose_device()
            membership = self._agent.wait_for_news(deadline - time.monotonic())
            if membership is None:
                raise FatalError(
                    f"no membership after epoch {self.mesh.epoch} from the agent "
                    f"({failure}); see the agent's log"
                )
            self._enter(State.RECONFIGURING)
            links_replaced = self._agent.reconfigure(membership)
            self._events.emit(
                "reconfigured",
                epoch=membership.epoch,
                rank=self.rank,
                links_replaced=links_replaced,
            )
        if self._device is not None and self._device.is_empty:
            self._protected().lose_device()
        if self._groups is not None:
            self._groups.settle(self._control)
        reports = self._exchange_reports()
        decision = self._decide(reports)
        self._enter(State.RESTORING)
        self.phase("recovery")
        self._restore(decision)
        self._protected().connect(reports, decision.target)
        self._is_first_step = True
        return decision

    def _decide(self, reports: Sequence[Report]) -> Decision:
        newest = max(reports, key=lambda report: tuple(report.saved))
        if newest.checkpoint:
            self.saved = (newest.saved[0], newest.saved[1])
            self.checkpoint = newest.checkpoint
        self._is_stopping = any(report.is_stopping for report in reports)
        loads = [report.loading for report in reports if report.loading]
        try:
            decision = decide(reports)
        except NoSourceForState as error:
            where = self.checkpoint or self.no_checkpoint
            raise NoSourceForState(f"{error} ({where})", error.keys) from None
        self._check_headway(decision, reports)
        # Where the job is behind it, all have loaded.
        left = [load for load in loads if load["version"] >= decision.target]
        self.owed = left[0] if left else {}
        furthest = max(report.furthest for report in reports)
        self.furthest_of_all = max(self.furthest_of_all, furthest)
        if decision.newcomers:
            # At a version that the others have left, and at its own, a newcomer does
            # not meet them.
            passed = max(decision.target, furthest - 1)
            self._passed_version = max(self._passed_version, passed)
        others = {report.rank for report in reports} - set(decision.newcomers)
        self._speakers = others
        return decision

    def _check_headway(self, decision: Decision, reports: Sequence[Report]) -> None:
        """Raise StateMismatch where the job comes back to the same place for ever."""
        furthest = max(report.furthest for report in reports)
        before, self._place = self._place, (decision.target, furthest)
        is_of_a_loss = decision.newcomers or any(r.has_lost_device for r in reports)
        is_vain = self._place == before and not is_of_a_loss
        self._num_vain = self._num_vain + 1 if is_vain else 0
        if self._num_vain == _MAX_VAIN:
            raise StateMismatch(
                f"{_MAX_VAIN} repairs in a row have not brought the job past step "
                f"{furthest}, and no worker was lost: does every rank run the same "
                f"collectives? The last failure: {self._failure}",
                key="step",
            )

    def _exchange_reports(self) -> list[Report]:
        report = Report(
            rank=self.rank,
            newcomer=self._is_newcomer or self._protected().needs_replica,
            version=self.version,
            has_voted=self._has_voted,
            furthest=self._furthest,
            saved=self.saved,
            checkpoint=self.checkpoint,
            is_stopping=self._is_stopping,
            has_lost_device=self._device is not None and self._device.is_empty,
            loading=self._loading,
            **self._protected().report(),
        )
        blobs = self._control.gather(json.dumps(report.to_json()).encode())
        return [Report.from_json(json.loads(blob)) for blob in blobs]

    def _restore(self, decision: Decision) -> None:
        begun = time.monotonic()
        protection = self._protected()
        carrier = self._groups.carrier if self._groups is not None else None
        self.mesh.hold_replay(True)
        try:
            num_bytes = protection.restore(decision, self.version, carrier)
        finally:
            self.mesh.hold_replay(False)
        is_newcomer = self.rank in decision.newcomers
        if is_newcomer:
            self._furthest = decision.target
            self._events.emit(
                "state_received",
                epoch=self.mesh.epoch,
                rank=self.rank,
                bytes=num_bytes,
                from_devices=carrier.received_bytes if carrier is not None else 0,
                seconds=time.monotonic() - begun,
            )
        if is_newcomer or protection.is_sharded:
            self.version = decision.target
        if protection.is_sharded:
            self.mesh.absorb(False)
            self.mesh.hold_replay(True)
            try:
                protection.rebuild()
            finally:
                self.mesh.hold_replay(False)
            self._see_rebuilt()
        self._is_newcomer = False
        if self._device is not None:
            self._device.is_empty = False

    def _see_rebuilt(self) -> None:
        """Raise the failure that has cut a rebuild on devices short."""
        if self._device is None and self._groups is None:
            return
        self.wait_for_device()
        failure = self.mesh.failure()
        if failure is not None:
            self._protected().is_clean = False
            raise failure

    def end_setup(self) -> None:
        """The script's set-up is over: ``begin`` calls it, or who has no step left."""
        if not self._is_setting_up:
            return
        self._is_setting_up = False
        if self._setup_log is not None:
            self.mesh.stop_replay()
        else:
            log = self.mesh.stop_recording()
            self._agent.send("setup_log", data=base64.b64encode(log).decode())
        self._emit_groups()

    def _emit_groups(self) -> None:
        self._events.emit("groups", rank=self.rank, ids=group_ids())

    def _enter(self, state: State) -> None:
        if state is not self._state:
            logger.info(
                "rank=%d epoch=%d step=%d %s > %s",
                self.rank,
                self.mesh.epoch,
                self.version,
                self._state.value,
                state.value,
            )
        self._state = state
