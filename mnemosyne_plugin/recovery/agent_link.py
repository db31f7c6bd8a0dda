"""A worker's side of the channel to its agent: memberships in, evidence out."""

import os
import selectors
import threading
from contextlib import suppress
from typing import Any

from mnemosyne_plugin import ccl
from mnemosyne_plugin.errors import MnemosyneError
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.recovery.channel import Channel
from mnemosyne_plugin.recovery.device import Device
from mnemosyne_plugin.recovery.device_groups import DeviceGroups
from mnemosyne_plugin.recovery.membership import Membership


class AgentLink:
    """Runs one thread, which reads the channel and watches the mesh for failures.

    A newer membership fences the mesh at once, whatever the main thread is doing; the
    main thread then takes it by ``wait_for_news`` and ``reconfigure``.
    """

    def __init__(
        self,
        mesh: ccl.Mesh,
        channel: Channel,
        rank: int,
        membership: Membership,
        events: EventLog,
        device: Device | None = None,
        groups: DeviceGroups | None = None,
    ) -> None:
        self._mesh = mesh
        self._device = device
        self._groups = groups
        self._channel = channel
        self._rank = rank
        self._events = events
        self._news = threading.Condition()
        self._membership = membership  # guarded by _news
        self._is_finished = False  # guarded by _news
        self._is_orphan = False  # guarded by _news
        self._is_stop_asked = False
        self._epoch_lock = threading.Lock()  # a fence never hits the epoch it is for
        self._is_closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reader = threading.Thread(
            target=self._read, name="mnemosyne-reader", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        # A forked child (a data loader's worker) must not keep the channel open.
        os.register_at_fork(after_in_child=self._channel.close)
        self._reader.start()

    def close(self) -> None:
        """Stop the thread. The mesh and the channel belong to the caller."""
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self._reader.join()
        os.close(self._wake)

    @property
    def is_finished(self) -> bool:
        """Whether the agent has said that all ranks are done."""
        return self._is_finished

    @property
    def is_stop_asked(self) -> bool:
        """Whether the agent has asked the job to save its state and to end."""
        return self._is_stop_asked

    @property
    def is_orphan(self) -> bool:
        """Whether the agent is gone."""
        return self._is_orphan

    @property
    def membership(self) -> Membership:
        """The newest membership."""
        with self._news:
            return self._membership

    def send(self, kind: str, **fields: Any) -> None:
        """Tell the agent; if it is gone, note that."""
        try:
            self._channel.send(kind, **fields)
        except (OSError, MnemosyneError):
            self._lose_agent()

    def wait_for_news(self, timeout_s: float | None) -> Membership | None:
        """Wait for a membership newer than the mesh, and return it.

        Returns None at the job's end, when the agent is gone, or after the timeout.
        """
        with self._news:
            self._news.wait_for(
                lambda: (
                    self._is_finished
                    or self._is_orphan
                    or self._membership.epoch > self._mesh.epoch
                ),
                timeout=timeout_s,
            )
            is_newer = self._membership.epoch > self._mesh.epoch
            return self._membership if is_newer and not self._is_orphan else None

    def reconfigure(self, membership: Membership) -> int:
        """Move the mesh to ``membership``; returns the number of links replaced."""
        members = [(m.worker_id, m.address) for m in membership.members]
        with self._epoch_lock:
            links_replaced = self._mesh.reconfigure(
                membership.epoch, self._rank, members
            )
            if self._device is not None:
                self._device.proxy.admit_communicators()
        os.eventfd_write(self._wake, 1)
        return links_replaced

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(self._mesh.failure_fd, selectors.EVENT_READ)
            lost_fd = -1
            if self._device is not None:
                lost_fd = self._device.proxy.lost_fd
                selector.register(lost_fd, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(self._watch())]
                if lost_fd in ready:
                    assert self._device is not None
                    self._device.proxy.acknowledge()
                    self._device.look()
                if self._mesh.failure_fd in ready:
                    # It stays readable until the next reconfigure, which wakes us.
                    selector.unregister(self._mesh.failure_fd)
                    self._report_failure()
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                    if self._is_closing:
                        return
                    with suppress(KeyError):
                        selector.register(self._mesh.failure_fd, selectors.EVENT_READ)
                if self._channel in ready and not self._take_message():
                    return

    def _watch(self) -> float | None:
        """Look after what may never end; return when to look again, in seconds."""
        limits: list[float | None] = []
        if self._device is not None:
            limits.append(self._device.watch(self._mesh.failure() is not None))
        if self._groups is not None:
            limits.append(self._groups.watch())
        return min((limit for limit in limits if limit is not None), default=None)

    def _report_failure(self) -> None:
        with self._epoch_lock:
            failure, epoch = self._mesh.failure(), self._mesh.epoch
            if failure is None:  # repaired in the meantime
                return
            if self._device is not None:
                self._device.release()
            if self._groups is not None:
                self._groups.release()
            if self._device is not None and self._device.has_bad_communicator:
                self._device.has_bad_communicator = False
                if self._groups is not None:
                    self._groups.lose_device()
        self._events.emit("fenced", epoch=epoch, rank=self._rank, reason=str(failure))
        news = self._device.take_news() if self._device is not None else None
        if news is not None:
            self.send("device_lost", epoch=epoch, reason=news)
            return
        self.send(
            "link_lost",
            lost_rank=getattr(failure, "rank", -1),
            epoch=epoch,
            reason=str(failure),
        )

    def _take_message(self) -> bool:
        try:
            message = self._channel.receive(None)
        except (OSError, MnemosyneError):
            message = None
        if message is None:
            self._lose_agent()
            return False
        if message["kind"] == "membership":
            membership = Membership.from_json(message["membership"])
            with self._news:
                self._membership = membership
                self._news.notify_all()
            with self._epoch_lock:
                if membership.epoch > self._mesh.epoch:
                    self._mesh.fence(f"epoch {membership.epoch} was published")
        elif message["kind"] == "stop":
            self._is_stop_asked = True
        elif message["kind"] == "finish":
            with self._news:
                self._is_finished = True
                self._news.notify_all()
        return True

    def _lose_agent(self) -> None:
        with self._news:
            self._is_orphan = True
            self._news.notify_all()
        self._mesh.fence("the agent is gone")
