"""The agent: keeps this node's ranks and standbys alive as the leader decides.

Everything runs as callbacks of one event loop in the main thread. The only other
threads wait for the store: one joins the job; with several agents, one reads the
evidence (in the leader) or the decisions (elsewhere). They hand what they got to the
loop. What the leader itself sees and decides does not pass through the store.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from mnemosyne_plugin.errors import MnemosyneError, PeerLost
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.launch.board import Board, Party, StoreLost, join
from mnemosyne_plugin.launch.leader import BEAT_S, Leader
from mnemosyne_plugin.launch.prctl import become_subreaper
from mnemosyne_plugin.launch.ranks import RankLogs, RankSpec, environments
from mnemosyne_plugin.launch.workforce import REAP_TIMEOUT_S, Worker, Workforce
from mnemosyne_plugin.recovery.membership import (
    AgentLost,
    Cure,
    Decision,
    DeviceLost,
    Done,
    Evidence,
    Exited,
    Finish,
    LinkLost,
    Membership,
    Protected,
    Ready,
    Restart,
    SetupLogged,
    Stop,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 60.0
"""For a worker whose job is done to leave by itself: a script's atexit handlers may
write files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSpec:
    """What the user asked for on this node."""

    num_ranks: int
    num_standbys: int
    preload: tuple[str, ...]
    environment: Mapping[str, str]
    """What workers have on top of the agent's own."""
    max_restarts: int | None
    script: str
    args: tuple[str, ...]
    is_module: bool
    transport: str
    run_dir: str
    local_addr: str | None
    shutdown_timeout_s: float
    entry_module: str
    """What the nursery runs; it must call ``nursery.main``."""
    signals: tuple[signal.Signals, ...]
    """Those that end the job."""
    logs: LogsSpecs
    ranks: RankSpec


class Agent:
    """One node's part of a job. Construct and run in the main thread."""

    def __init__(self, spec: AgentSpec, handler: RendezvousHandler) -> None:
        self._spec = spec
        self._handler = handler
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._on_exception)
        self._party: Party | None = None
        self._leader: Leader | None = None
        self._events = EventLog(None, "")
        self._envs: dict[int, dict[str, str]] = {}
        self._setup_logs: dict[int, str] = {}
        self._beat = 0
        self._is_store_lost = False
        self._is_leaving = False
        self._stopped_by: signal.Signals | None = None
        self.exit_code: int | None = None
        self.finish: Finish | None = None
        self.checkpoint = ""
        """The newest that this node's workers have told of."""
        self.failed: dict[int, Worker] = {}
        """Workers of this agent that held a rank and died, by their id."""
        self.logs: RankLogs | None = None
        become_subreaper()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in spec.signals:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                self._loop.add_signal_handler(number, self._on_signal, number)
        self._force = Workforce(
            *(self._loop, self, spec.entry_module, spec.run_dir),
            preload=spec.preload,
            environment=spec.environment,
        )

    @property
    def board(self) -> Board | None:
        """The store of the job, once this agent has joined it."""
        return self._party.board if self._party else None

    def run(self) -> int:
        """Take part in the job until its end; return the exit code."""
        try:
            threading.Thread(target=self._join, name="join", daemon=True).start()
            self._loop.run_forever()
        finally:
            self._clean_up()
        assert self.exit_code is not None
        return self.exit_code

    # --- joining ------------------------------------------------------------------

    def _join(self) -> None:
        """In a thread of its own: meet the other agents."""
        spec = self._spec
        try:
            party = join(
                self._handler,
                num_ranks=spec.num_ranks,
                role=spec.ranks.role,
                run_dir=spec.run_dir,
                local_addr=spec.local_addr,
            )
        except Exception as error:
            self._post(partial(self._give_up, f"cannot join the job: {error}"))
        else:
            self._post(partial(self._on_joined, party))

    def _on_joined(self, party: Party) -> None:
        if self.exit_code is not None:
            return
        self._party, board = party, party.board
        self._events = EventLog(self._spec.run_dir, f"agent-{board.agent}")
        if board.is_leader:
            self._events.emit("job_started", num_agents=board.num_agents)
            self._leader = Leader(
                board, self._spec.max_restarts, self._loop.call_later, self._publish
            )
        if board.num_agents > 1:
            log = "evidence" if board.is_leader else "decision"
            board.follow(log, lambda entry: self._post(partial(self._on_entry, entry)))
            self._send_beat()
        self._begin_attempt(0)

    def _send_beat(self) -> None:
        if not self._is_leaving:
            self._board().beat(self._beat)
            self._beat += 1
            self._loop.call_later(BEAT_S, self._send_beat)

    # --- workers ------------------------------------------------------------------

    def _begin_attempt(self, attempt: int) -> None:
        self._setup_logs.clear()
        if self.logs is not None:
            self.logs.close()
        spec, board = self._spec, self._board()
        self._envs = environments(spec.ranks, board, attempt)
        self.logs = RankLogs(spec.ranks, spec.logs, self._envs)
        self._force.staff(
            {
                "secret": board.secret,
                "bind_host": board.bind_host(),
                "transport": spec.transport,
                "run_dir": spec.run_dir,
                "script": spec.script,
                "args": spec.args,
                "is_module": spec.is_module,
            },
            first_id=board.agent << 32,
            attempt=attempt,
            target=spec.num_ranks + spec.num_standbys,
        )

    def on_started(self, worker: Worker) -> None:
        """See Owner."""
        self._emit("worker_started", worker)

    def on_message(self, worker: Worker, message: dict[str, Any]) -> None:
        """See Owner."""
        kind, rank, attempt = message["kind"], worker.rank, worker.attempt
        if kind == "ready":
            worker.is_ready = True
            worker.pid = message["pid"]  # the nursery's word may come later
            self._emit("worker_ready", worker)
            self._tell(
                Ready(
                    attempt=attempt,
                    agent=self._board().agent,
                    worker_id=worker.worker_id,
                    address=message["address"],
                )
            )
        elif kind == "failed":
            worker.traceback = message["traceback"]
            worker.is_fatal = message["fatal"]
            worker.is_state_lost = message["is_state_lost"]
            worker.step, worker.cure = message["step"], message["cure"]
            worker.device_error = message["device_error"]
            if worker.device_error:
                self._on_device_error(worker)
        elif rank < 0:
            raise MnemosyneError(
                f"worker {worker.worker_id} sent {kind} without a rank"
            )
        elif kind == "setup_log":
            self._setup_logs[rank] = message["data"]
            self._tell(SetupLogged(attempt=attempt, rank=rank))
        elif kind == "modules":
            self._force.preload(message["names"])
        elif kind == "protected":
            may_restart = message["may_restart"]
            self._tell(Protected(attempt=attempt, rank=rank, may_restart=may_restart))
            self._emit("protected", worker)
        elif kind == "device_lost":
            epoch, reason = message["epoch"], message["reason"]
            self._emit("device_lost", worker, epoch=epoch, reason=reason)
            self._tell(
                DeviceLost(attempt=attempt, rank=rank, epoch=epoch, reason=reason)
            )
        elif kind == "link_lost":
            lost, epoch = message["lost_rank"], message["epoch"]
            self._emit("link_lost", worker, lost_rank=lost, epoch=epoch)
            self._tell(
                LinkLost(attempt=attempt, rank=rank, lost_rank=lost, epoch=epoch)
            )
        elif kind == "checkpoint":
            self.checkpoint = message["folder"]
        elif kind == "can_save":
            worker.can_save = True
        elif kind == "saved":
            self._on_saved(message["checkpoint"])
        elif kind == "done":
            self._tell(Done(attempt=attempt, rank=rank))

    def on_exit(self, worker: Worker) -> None:
        """See Owner."""
        exit_code = worker.exit_code
        number = -exit_code if exit_code < 0 else None
        self._emit("worker_exited", worker, exit_code=exit_code, signal=number)
        is_news = worker.rank >= 0 or worker.is_ready or not worker.is_retired
        if self.exit_code is None and is_news:
            if worker.rank >= 0 and exit_code != 0:
                self.failed[worker.worker_id] = worker
            self._tell(
                Exited(
                    attempt=worker.attempt,
                    agent=self._board().agent,
                    worker_id=worker.worker_id,
                    exit_code=exit_code,
                    traceback=worker.traceback,
                    fatal=worker.is_fatal,
                    is_state_lost=worker.is_state_lost,
                    step=worker.step,
                    cure=worker.cure,
                    device_error=worker.device_error,
                )
            )

    def _on_device_error(self, worker: Worker) -> None:
        """Tell the operator which device of which node it is."""
        worker.device_error += f", on node {socket.gethostname()}"
        if worker.cure != Cure.USER:
            logger.error("rank %d: %s", worker.rank, worker.device_error)
        self._emit(
            "device_failed",
            worker,
            reason=worker.device_error,
            cure=worker.cure,
            step=worker.step,
        )
        self._loop.call_later(EXIT_TIMEOUT_S, self._give_up_stuck, worker)

    def _give_up_stuck(self, worker: Worker) -> None:
        """End the job if a worker cannot end, since its driver does not let it."""
        is_there = self._force.workers.get(worker.worker_id) is worker
        if is_there and self.exit_code is None:
            what = f"rank {worker.rank}: {worker.device_error}"
            self._give_up(f"{what}; its worker, pid {worker.pid}, does not end")

    def on_nursery_lost(self, reason: str) -> None:
        """See Owner."""
        self._give_up(reason)

    def on_empty(self) -> None:
        """See Owner."""
        self._leave()

    # --- decisions ----------------------------------------------------------------

    def _on_entry(self, entry: dict[str, Any] | None) -> None:
        """Take what another agent wrote: evidence for the leader, or its decisions."""
        if entry is None:
            if self.exit_code is None:
                raise StoreLost("the leader is gone")
        elif self._leader is not None:
            self._leader.hear(decode(entry))
        else:
            self._on_decision(decode(entry))

    def _publish(self, decision: Decision) -> None:
        """As leader: tell all agents, this one included."""
        board = self._board()
        if board.num_agents > 1:
            board.append("decision", encode(decision))
        self._loop.call_soon(self._on_decision, decision)

    def _on_decision(self, decision: Decision) -> None:
        if isinstance(decision, Finish):
            self.finish = self.finish or decision
            self._end(decision.exit_code)
        elif isinstance(decision, Restart) and self.exit_code is None:
            self._events.emit("restarted", attempt=decision.attempt)
            if self._stopped_by is not None:  # nobody is left who could save
                self._end_by(self._stopped_by)
                return
            self._begin_attempt(decision.attempt)
        elif isinstance(decision, Membership) and self.exit_code is None:
            self._take_membership(decision)

    def _take_membership(self, membership: Membership) -> None:
        board, value = self._board(), membership.to_json()
        self._events.emit("membership", **value)
        for rank, member in enumerate(membership.members):
            worker = self._force.workers.get(member.worker_id)
            if member.agent != board.agent or worker is None:
                continue  # another agent's, or dead again: its exit was told
            try:
                if worker.rank < 0:
                    self._seat(worker, rank, membership.epoch, value)
                else:
                    worker.channel.send("membership", membership=value)
            except PeerLost:
                pass  # dead: its exit is about to be seen
            except MnemosyneError:
                worker.kill(signal.SIGKILL)  # it hangs

    def _seat(
        self, worker: Worker, rank: int, epoch: int, membership: dict[str, Any]
    ) -> None:
        logs = self.logs
        assert logs is not None
        local_rank = rank - self._board().first_rank
        setup_log = self._setup_logs.get(rank)
        worker.rank = rank
        worker.channel.send(
            "seat",
            rank=rank,
            membership=membership,
            env=self._envs[local_rank],
            logs=logs.paths(local_rank),
            setup_log=setup_log,
        )
        self._emit("seated", worker, epoch=epoch, newcomer=setup_log is not None)

    def _tell(self, evidence: Evidence) -> None:
        if self.exit_code is not None and not isinstance(evidence, Stop):
            return
        if self._leader is not None:
            self._leader.hear(evidence)
        else:
            self._board().append("evidence", encode(evidence))

    # --- the end ------------------------------------------------------------------

    def _on_signal(self, number: signal.Signals) -> None:
        if self.exit_code is not None:
            self._kill_workers()  # the user is out of patience
            return
        if self._stopped_by is None and self._ask_for_checkpoint():
            self._stopped_by = number
            logger.warning("got %s; the job saves its state, and ends", number.name)
            return
        self._end_by(number)

    def _ask_for_checkpoint(self) -> bool:
        """Ask the workers to save in front of their next step; False if none can."""
        able = [w for w in self._force.workers.values() if w.rank >= 0 and w.can_save]
        for worker in able:
            with suppress(MnemosyneError):  # dead, or it hangs
                worker.channel.send("stop")
        return bool(able)

    def _on_saved(self, checkpoint: str) -> None:
        """A worker says that all ranks have saved."""
        number, self._stopped_by = self._stopped_by, None
        if number is not None and self.exit_code is None:
            logger.warning("saved: %s", checkpoint)
            self._end_by(number)

    def _end_by(self, number: signal.Signals) -> None:
        logger.warning("got %s; ending the job", number.name)
        self._end(128 + number)
        if self.board is not None:
            self._tell(Stop(signal=number))

    def _give_up(self, reason: str) -> None:
        """End the job for a reason that lies with this agent."""
        logger.error("%s", reason)
        if self.board is not None and self.exit_code is None:
            self._tell(AgentLost(agent=self.board.agent, reason=reason))
        self._end(3)

    def _on_exception(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, StoreLost):
            self._is_store_lost = True
            if self.exit_code is None:
                logger.error("%s; ending this node's workers", error)
            self._end(3)
            return
        logger.error("bug in the agent: %s", context["message"], exc_info=error)
        try:
            self._give_up("it met a bug of its own")
        finally:
            self._end(3)

    def _end(self, exit_code: int) -> None:
        """End this node's part; the first exit code stays."""
        if self.exit_code is not None:
            return
        self.exit_code = exit_code
        self._events.emit("job_finished", exit_code=exit_code)
        if exit_code == 0:
            for worker in self._force.workers.values():
                # One that is gone, or hangs, will be told by a signal.
                with suppress(MnemosyneError):
                    worker.channel.send("finish")
            self._loop.call_later(EXIT_TIMEOUT_S, self._terminate_workers)
        else:
            self._terminate_workers()
        self._force.disband()

    def _terminate_workers(self) -> None:
        self._force.signal(signal.SIGTERM)
        self._loop.call_later(self._spec.shutdown_timeout_s, self._kill_workers)

    def _kill_workers(self) -> None:
        self._force.signal(signal.SIGKILL)
        self._loop.call_later(REAP_TIMEOUT_S, self._leave)

    def _leave(self) -> None:
        """Stop the loop; the leader's store stays until all agents are done with it."""
        if self._is_leaving:
            return
        self._is_leaving = True
        board = self.board
        if board is None or self._is_store_lost or board.num_agents == 1:
            self._loop.stop()
            return
        threading.Thread(
            target=self._say_goodbye, args=(board,), name="leave", daemon=True
        ).start()

    def _say_goodbye(self, board: Board) -> None:
        try:
            board.leave()
            if self._leader is not None:
                timeout_s = self._spec.shutdown_timeout_s + REAP_TIMEOUT_S
                board.wait_for_others(self._leader.lost_agents, timeout_s)
        except StoreLost:
            pass  # the leader did not wait for us: nothing is left to tell
        finally:
            self._post(self._loop.stop)

    def _clean_up(self) -> None:
        self._force.close()
        if self.logs is not None:
            self.logs.close()
        self._events.close()
        # After a signal the rendezvous stays open, as torchrun leaves it.
        if self._party is not None and (self.exit_code or 0) < 128:
            self._handler.shutdown()
        self._loop.close()

    # --- the event loop -----------------------------------------------------------

    def _post(self, callback: Callable[[], Any]) -> None:
        """Run the callback on the loop. From any thread."""
        with suppress(RuntimeError):  # the loop is closed: the job is over
            self._loop.call_soon_threadsafe(callback)

    def _reap(self) -> None:
        self._force.reap()

    def _emit(self, name: str, worker: Worker, **facts: Any) -> None:
        rank = None if worker.rank < 0 else worker.rank
        common = {"rank": rank, "worker_id": worker.worker_id, "pid": worker.pid}
        self._events.emit(name, **common, **facts)

    def _board(self) -> Board:
        assert self.board is not None
        return self.board
