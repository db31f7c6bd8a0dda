"""The groups whose tensors lie on devices, when a rank is lost: what moves those
tensors ends, within a time limit, and is made anew where a member was replaced.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from mnemosyne_plugin import ccl
from mnemosyne_plugin.ccl.devices import DeviceGroup, Devices, device_groups
from mnemosyne_plugin.ccl.graphs import Graphs
from mnemosyne_plugin.errors import GroupAborted
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.recovery import device_errors
from mnemosyne_plugin.recovery.control import ControlGroup

_ABORT_S = 10.0  # an abort that takes longer, of what is connected, never ends
_LOOK_S = 1.0  # between looks at what a group's own backend may have noticed


class Carrier:
    """Moves state from device to device, by a group of all ranks."""

    def __init__(self, group: DeviceGroup, groups: "DeviceGroups") -> None:
        self._group, self._groups = group, groups
        self.device_type = groups.devices.type
        self.received_bytes = 0

    def move(
        self,
        outgoing: Sequence[tuple[torch.Tensor, int]],
        incoming: Sequence[tuple[torch.Tensor, int]],
    ) -> None:
        """Send each tensor to a rank, receive others, and wait until it has happened.

        Raises the failure that has cut it short.
        """
        # As one bundle: alone each pair of ranks would make a communicator of its own.
        self._group._start_coalescing()
        try:
            for tensor, rank in outgoing:
                self._group.send([tensor], rank, 0)
            for tensor, rank in incoming:
                self._group.recv([tensor], rank, 0)
        finally:
            work = self._group._end_coalescing()
        work.wait()
        self._groups.finish()
        self.received_bytes += sum(tensor.nbytes for tensor, _ in incoming)


class DeviceGroups:
    """Those of this rank. The main thread's, but ``release`` and ``watch``."""

    def __init__(
        self,
        devices: Devices,
        mesh: ccl.Mesh,
        rank: int,
        events: EventLog,
        look: Callable[[], None] = lambda: None,
        graphs: Graphs | None = None,
        find: Callable[[], list[DeviceGroup]] = device_groups,
        give_up: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ) -> None:
        """look: fences the mesh if it is the device itself that has failed.

        graphs: those that may hold operations of groups.

        give_up: ends this process, so that another one takes its rank.
        """
        self.devices = devices
        self._look = look
        self._graphs = graphs
        self._mesh = mesh
        self._rank = rank
        self._events = events
        self._find = find
        self._give_up = give_up
        self._device: torch.device | None = None  # the main thread's
        self._connecting: Sequence[DeviceGroup] = ()
        self.carrier: Carrier | None = None
        """What moves state, once groups have settled; the same on all ranks."""
        self._aborts: list[threading.Thread] = []
        self._abort_by = 0.0
        self._abort_s = devices.connect_s + _ABORT_S
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for all that the devices were given."""
        self._device = self.devices.used()
        self.devices.wait()

    def finish(self) -> None:
        """As ``wait``; raises the failure that may have cut it short."""
        self.wait()
        self._look()
        self.look()
        failure = self._mesh.failure()
        if failure is not None:
            raise failure

    def lose_device(self) -> None:
        """What this rank's groups had there is gone: have them made anew."""
        used = [group for group in self._find() if group.inner is not None]
        self._abort([group.abort_inner for group in used])

    def settle(self, control: ControlGroup) -> None:
        """Make anew what cannot be used on, on all its ranks. Collective.

        A group is used on if all its members have asked it for the same and have had
        that: it holds no lost rank, and nothing was in flight in it.
        """
        self.carrier = None
        # What they were given before may still write to what is restored next. If the
        # reader's thread came too late to see the failure, nothing is aborted yet.
        self._device = self.devices.used()
        self.release()
        self._join_aborts()  # what one has not yet hit would pass for quiet
        self.wait()  # one that is broken tells here, and costs this worker
        groups = {group.key: group for group in self._find()}
        offers = {key: self._offer(group) for key, group in groups.items()}
        blobs = control.gather(json.dumps(offers).encode())
        by_rank = [
            {int(key): offer for key, offer in json.loads(blob).items()}
            for blob in blobs
        ]
        everyone = list(range(len(by_rank)))
        old, new = [], list[tuple[DeviceGroup, bool]]()
        for key in sorted(groups):
            members = groups[key].global_ranks
            # A member that has not made it, or destroyed it, will not connect.
            are_there = all(key in by_rank[rank] for rank in members)
            stands = [by_rank[rank].get(key, _NOTHING) for rank in members]
            is_used = any(stand[_COLLECTIVES] > 0 for stand in stands)
            if self.carrier is None and are_there and is_used and members == everyone:
                self.carrier = Carrier(groups[key], self)
            if all(stand == _NOTHING for stand in stands) or _agree(stands):
                continue
            if offers[key] != _NOTHING:
                old.append(groups[key])
            if are_there:
                new.append((groups[key], is_used))
        self._drop(old)
        self._connect(new)
        self._events.emit(
            "device_groups",
            epoch=self._mesh.epoch,
            rank=self._rank,
            made_anew=len(new),
            kept=sum(group.inner is not None for group in groups.values()) - len(new),
        )

    def _offer(self, group: DeviceGroup) -> list[Any]:
        launches = self._graphs.num_launches(group) if self._graphs is not None else 0
        return [*group.standing(), launches]

    def _drop(self, groups: Sequence[DeviceGroup]) -> None:
        self._abort([group.abort_inner for group in groups])
        self._join_aborts()
        for group in groups:
            group.drop_inner()

    def _join_aborts(self) -> None:
        for thread in list(self._aborts):
            thread.join(max(0.0, self._abort_by - time.monotonic()))
        self.watch()
        with self._lock:
            self._aborts = [each for each in self._aborts if each.is_alive()]

    def _connect(self, groups: Sequence[tuple[DeviceGroup, bool]]) -> None:
        """Side by side: each takes its time to find its members.

        A group of which collectives were asked has them communicate at once.
        """
        errors: list[Exception] = []
        works: list[Any] = []
        device = self.devices.current() if groups else None

        def connect(group: DeviceGroup, once: bool) -> None:
            assert device is not None
            try:
                work = self.devices.connect(group, device, once)
                if work is not None:
                    works.append(work)
            except Exception as error:
                errors.append(error)
                # The others may be in what this rank has not come to.
                self._abort([group.abort_inner])
                self._look()
                if self._mesh.failure() is None:
                    self._mesh.fence(f"rank {self._rank}: {error}")

        threads = [
            threading.Thread(target=connect, args=each, name="mnemosyne-connect")
            for each in groups
        ]
        self._connecting = [group for group, _ in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # a failure of the mesh ends it, by ``release``
        self._connecting = ()
        for error in errors:
            if device_errors.is_lasting(error):
                raise error  # so would each repair
        if errors:
            raise self._mesh.failure() or GroupAborted(str(errors[0]), self._rank)
        for work in works:
            work.wait()
        self.finish()

    def _abort(self, aborts: Sequence[Callable[[], None]]) -> None:
        """Start them, all at once: one may wait for another."""
        with self._lock:
            self._abort_by = time.monotonic() + self._abort_s
            for abort in aborts:
                thread = threading.Thread(
                    target=abort, name="mnemosyne-abort", daemon=True
                )
                thread.start()
                self._aborts.append(thread)

    def _drain(self) -> None:
        """Wait for the device as for an abort, which has a time limit."""
        if self._device is not None:
            with suppress(RuntimeError):  # the main thread tells of it
                self.devices.wait(self._device)

    # --- the reader's thread ------------------------------------------------------

    def release(self) -> None:
        """A failure is latched: have the main thread wait for no other rank."""
        # Whether one is busy is a question that may wait for the device.
        busy = [group.abort_inner_if_busy for group in self._find()]
        others = list(self._connecting)
        if self._graphs is not None:
            others += self._graphs.in_flight()
        self._abort([*busy, *(group.abort_inner for group in others), self._drain])

    def watch(self) -> float:
        """Fence the mesh if a group has failed on its device, and links know nothing.

        Gives this process up if an abort never ends. Returns when to look again.
        """
        with self._lock:
            is_busy = any(thread.is_alive() for thread in self._aborts)
        left = self._abort_by - time.monotonic()
        if is_busy and left <= 0:
            self._events.emit("device_hangs", rank=self._rank, seconds=self._abort_s)
            self._give_up()
        self.look()
        return min(left, _LOOK_S) if is_busy else _LOOK_S

    def look(self) -> None:
        """Fence the mesh if a group has failed on its device. Any thread."""
        for group in self._find():
            group.look()


_NOTHING = [-1, True, 0, [], [], 0]
_COLLECTIVES = 2  # of a standing: how many were asked for


def _agree(stands: Sequence[list[Any]]) -> bool:
    """Tell whether its members, by rank, can use it on."""
    lives, quiet, collectives, sent, received, launches = zip(*stands, strict=True)
    if -1 in lives or not all(quiet):
        return False
    if any(len({*each}) > 1 for each in (lives, collectives, launches)):
        return False
    return list(sent) == [list(column) for column in zip(*received, strict=True)]
