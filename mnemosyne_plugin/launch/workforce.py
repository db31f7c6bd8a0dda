"""The processes of one agent: as many workers as it needs, and their nursery.

Runs on the agent's event loop. A death is seen by its SIGCHLD; what the process had
said before is handled first.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from mnemosyne_plugin.errors import MnemosyneError, PeerLost
from mnemosyne_plugin.launch.board import StoreLost
from mnemosyne_plugin.launch.nursery import Nursery
from mnemosyne_plugin.launch.reaper import (
    kill_children,
    kill_group,
    kill_orphans,
)
from mnemosyne_plugin.recovery.channel import Channel

logger = logging.getLogger(__name__)

NURSERY_LIMIT = 3
"""Nurseries of a job that may die, or be given up for a module that starts threads."""

REAP_TIMEOUT_S = 10.0
"""For the kernel to end a process that got SIGKILL; longer means that it hangs in a
driver, and waiting would not help."""


@dataclass(kw_only=True, slots=True)
class Worker:
    """A process that the nursery was asked for."""

    worker_id: int
    attempt: int
    channel: Channel
    nursery: Nursery
    pid: int = 0
    """0 until the nursery says it."""
    rank: int = -1
    """-1: a standby."""
    is_ready: bool = False
    is_retired: bool = False
    """The agent wants it to end; it counts no more."""
    traceback: str = ""
    is_fatal: bool = False
    is_state_lost: bool = False
    step: int = -1
    """Of the script, when it raised."""
    cure: str = ""
    """See ``membership.Cure``."""
    device_error: str = ""
    """Which device has failed, and how; "": none has."""
    can_save: bool = False
    """It saves the job's state in front of its next step, if it is asked to."""
    exit_code: int = 0

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to it and what it started, if it exists by now."""
        if self.pid:
            kill_group(self.pid, number)


class Owner(Protocol):
    """What the agent does with the news of its processes."""

    def on_started(self, worker: Worker) -> None:
        """Take note of a new process."""

    def on_message(self, worker: Worker, message: dict[str, Any]) -> None:
        """Handle what a worker says. Raises MnemosyneError for nonsense."""

    def on_exit(self, worker: Worker) -> None:
        """Handle a worker's end; its exit_code is set."""

    def on_nursery_lost(self, reason: str) -> None:
        """End the job: there will be no more workers."""

    def on_empty(self) -> None:
        """Go on with the end: after ``disband``, no process is left."""


class Workforce:
    """Keeps ``target`` workers alive, each forked by the warmest nursery.

    Main thread only. Construct it before the job is joined: the nursery imports
    torch in the meantime.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        owner: Owner,
        entry_module: str,
        run_dir: str,
        preload: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """environment: what workers have on top of the agent's own."""
        self._loop = loop
        self._owner = owner
        self._entry_module = entry_module
        self._run_dir = run_dir
        self._wanted = tuple(preload)
        self._environment = dict(environment)
        self.workers: dict[int, Worker] = {}
        self._order: dict[str, Any] = {}
        self._first_id = 0
        self._num_forked = 0
        self._attempt = 0
        self._target = 0
        self._is_disbanded = False
        # pids that ended before the nursery said whose they are.
        self._unclaimed: dict[int, int] = {}
        self._nurseries: dict[int, Nursery] = {}
        self._num_nurseries_lost = 0
        self._knows_modules = False
        self._warming: Nursery | None = None
        self._nursery: Nursery | None = self._start_nursery(())

    def staff(
        self, order: dict[str, Any], first_id: int, attempt: int, target: int
    ) -> None:
        """From now on, have ``target`` workers of this attempt, and only those."""
        self._order, self._first_id = order, first_id
        self._attempt, self._target = attempt, target
        for worker in list(self.workers.values()):
            if worker.attempt < attempt:
                self.retire(worker)
        self._refill()

    def retire(self, worker: Worker) -> None:
        """Replace a worker."""
        worker.is_retired = True
        worker.kill(signal.SIGKILL)

    def preload(self, modules: Sequence[str]) -> None:
        """Have later workers, and standbys, start with these modules imported."""
        if not self._knows_modules:
            self._knows_modules = True
            self._warm(modules)

    def disband(self) -> None:
        """Start no more workers; those that live are the caller's to end."""
        self._is_disbanded = True
        for pid in self._nurseries:
            os.kill(pid, signal.SIGKILL)
        for nursery in self._unborn():
            self._unwatch(nursery.channel)
        for worker in list(self.workers.values()):
            if not worker.pid:  # if it exists, it sees EOF; ``close`` sees to it
                self._unwatch(worker.channel)
                del self.workers[worker.worker_id]
        self._check_empty()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all workers."""
        for worker in self.workers.values():
            worker.kill(number)

    def close(self) -> None:
        """End what is left, orphans of workers included."""
        for worker in self.workers.values():
            self._unwatch(worker.channel)
        for nursery in self._nurseries.values():
            self._unwatch(nursery.channel)
        kill_children(REAP_TIMEOUT_S)

    def reap(self) -> None:
        """Take note of every child that ended. To be called on SIGCHLD."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            exit_code = os.waitstatus_to_exitcode(status)
            worker = next((w for w in self.workers.values() if w.pid == pid), None)
            if pid in self._nurseries:
                self._on_nursery_exit(self._nurseries.pop(pid), exit_code)
            elif worker is not None:
                self._on_worker_exit(worker, exit_code)
            elif self._unborn() or any(not w.pid for w in self.workers.values()):
                self._unclaimed[pid] = exit_code

    # --- workers ------------------------------------------------------------------

    def _refill(self) -> None:
        if self._is_disbanded:
            return
        workers = self.workers.values()
        if any(worker.attempt < self._attempt for worker in workers):
            return  # what they hold (devices, ports) may be needed
        living = sum(not worker.is_retired for worker in workers)
        for _ in range(self._target - living):
            self._fork()

    def _fork(self) -> None:
        if self._nursery is None:
            return
        self._num_forked += 1
        worker_id = self._first_id + self._num_forked
        try:
            channel = self._nursery.fork({**self._order, "worker_id": worker_id})
        except PeerLost:
            return  # its exit is about to be seen, and starts another
        worker = Worker(
            worker_id=worker_id,
            attempt=self._attempt,
            channel=channel,
            nursery=self._nursery,
        )
        self.workers[worker_id] = worker
        self._watch(channel, self._owner.on_message, worker)

    def _on_worker_exit(self, worker: Worker, exit_code: int) -> None:
        self._drain(worker.channel, self._owner.on_message, worker)
        self._unwatch(worker.channel)
        del self.workers[worker.worker_id]
        kill_orphans(worker.pid)
        worker.exit_code = exit_code
        self._owner.on_exit(worker)
        self._refill()
        self._check_empty()

    def _check_empty(self) -> None:
        if self._is_disbanded and not self.workers and not self._nurseries:
            self._owner.on_empty()

    # --- nurseries ----------------------------------------------------------------

    def _warm(self, modules: Sequence[str]) -> None:
        """Make a nursery with these modules out of the one that there is."""
        if self._nursery is None or self._is_disbanded:
            return
        try:
            self._warming = Nursery(
                *(self._entry_module, self._run_dir, self._wanted, modules),
                parent=self._nursery,
            )
        except PeerLost:
            return  # the other one is gone: standbys stay cold
        self._watch(self._warming.channel, self._on_nursery_message, self._warming)

    def _unborn(self) -> Sequence[Nursery]:
        """Return the nursery that is warming, if its pid is not known."""
        warming = self._warming
        return [] if warming is None or warming.pid else [warming]

    def _start_nursery(self, modules: Sequence[str]) -> Nursery:
        nursery = Nursery(
            *(self._entry_module, self._run_dir, self._wanted, modules),
            environment=self._environment,
        )
        self._nurseries[nursery.pid] = nursery
        self._watch(nursery.channel, self._on_nursery_message, nursery)
        return nursery

    def _on_nursery_message(self, nursery: Nursery, message: dict[str, Any]) -> None:
        if message["kind"] == "forked":
            self._on_forked(message["worker_id"], message["pid"])
            return
        nursery.is_warm = True
        if nursery is self._warming:
            self._warming = None
            nursery.pid = message["pid"]
            if self._unclaimed.pop(nursery.pid, None) is not None:
                self._unwatch(nursery.channel)  # dead again: standbys stay cold
                return
            self._nurseries[nursery.pid] = nursery
            if message["culprit"] is None:
                self._move_to(nursery)
            else:
                self._do_without(message["culprit"], nursery)

    def _on_forked(self, worker_id: int, pid: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is None:  # disbanded
            return
        worker.pid = pid
        self._owner.on_started(worker)
        if pid in self._unclaimed:
            self._on_worker_exit(worker, self._unclaimed.pop(pid))
        elif worker.is_retired:
            worker.kill(signal.SIGKILL)
        self._close_if_idle(worker.nursery)

    def _move_to(self, nursery: Nursery) -> None:
        """Fork from this nursery from now on; cold standbys make room for warm ones."""
        cold, self._nursery = self._nursery, nursery
        for worker in list(self.workers.values()):
            if worker.rank < 0:
                self.retire(worker)
        if cold is not None:
            self._close_if_idle(cold)
        self._refill()

    def _do_without(self, culprit: str, nursery: Nursery) -> None:
        """Warm another nursery, since this one has threads and must not fork."""
        logger.info("standbys start without %s: it starts a thread", culprit)
        self._unwatch(nursery.channel)
        self._num_nurseries_lost += 1
        if self._num_nurseries_lost < NURSERY_LIMIT:
            self._warm([name for name in nursery.modules if name != culprit])

    def _close_if_idle(self, nursery: Nursery) -> None:
        """End a nursery that was replaced, once it has forked all it was asked for."""
        expected = any(
            w.nursery is nursery and not w.pid for w in self.workers.values()
        )
        if nursery is not self._nursery and not expected:
            self._unwatch(nursery.channel)

    def _on_nursery_exit(self, nursery: Nursery, exit_code: int) -> None:
        self._drain(nursery.channel, self._on_nursery_message, nursery)
        self._unwatch(nursery.channel)
        for worker in list(self.workers.values()):
            if worker.nursery is nursery and not worker.pid:
                self._unwatch(worker.channel)
                del self.workers[worker.worker_id]
        if nursery is self._warming:
            self._warming = None
        if nursery is self._nursery and not self._is_disbanded:
            self._nursery = None
            self._num_nurseries_lost += 1
            if nursery.is_warm and self._num_nurseries_lost < NURSERY_LIMIT:
                self._nursery = self._start_nursery(nursery.modules)
            else:
                reason = f"its nursery ended with exit code {exit_code}"
                self._owner.on_nursery_lost(reason)
        self._refill()
        self._check_empty()

    # --- channels -----------------------------------------------------------------

    def _watch(
        self, channel: Channel, handle: Callable[[Any, dict[str, Any]], None], who: Any
    ) -> None:
        self._loop.add_reader(channel, self._drain, channel, handle, who)

    def _unwatch(self, channel: Channel) -> None:
        if channel.fileno() >= 0:
            self._loop.remove_reader(channel)
            channel.close()

    def _drain(
        self, channel: Channel, handle: Callable[[Any, dict[str, Any]], None], who: Any
    ) -> None:
        """Handle all messages that are there."""
        while channel.fileno() >= 0:
            try:
                message = channel.receive(0)
                if message is None:  # its exit is what counts, and is seen by itself
                    self._loop.remove_reader(channel)
                    if who in self._unborn():
                        self._warming = None
                        channel.close()
                    return
                handle(who, message)
            except TimeoutError:
                return
            except MnemosyneError as error:
                if not isinstance(who, Worker) or isinstance(error, StoreLost):
                    raise
                logger.error("worker %d talks nonsense: %s", who.worker_id, error)
                self._loop.remove_reader(channel)
                who.kill(signal.SIGKILL)
                return
