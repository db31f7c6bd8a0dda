"""All links of this process, as the manager of its rank sees them."""

import atexit
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch._C._distributed_c10d import Backend, Store

from mnemosyne_plugin.ccl import _C
from mnemosyne_plugin.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    PeerLost,
    StaleEpoch,
)

TRANSPORTS = ("auto", "tcp")

Failure = PeerLost | CollectiveTimeout | StaleEpoch | CollectiveMismatch


@dataclass(frozen=True)
class PendingOperation:
    """An operation that has begun and not ended; ranks are global."""

    kind: str
    group: str
    sequence: int
    num_bytes: int
    dtype: str  # as c10 names it; of the first input, if there is one
    age_s: float
    timeout_s: float
    waits_for: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.kind} of group {self.group}, sequence {self.sequence}, "
            f"{self.num_bytes} bytes: since {self.age_s:.3f} s of {self.timeout_s:g} "
            f"s, waits for ranks {list(self.waits_for)}"
        )


@dataclass(frozen=True)
class FinishedOperation:
    """An operation that has ended; times are those of ``time.time()``."""

    kind: str
    group: str
    sequence: int
    num_bytes: int
    dtype: str
    outcome: str  # "completed", "failed", or "absorbed": failed and kept quiet
    began_at: float
    ended_at: float
    error: str


class Mesh:
    """The links to all other workers, and the epoch that they are in.

    One per process. All methods may be called by any thread, also while others wait
    for collectives. In a process forked from the one that made it, they raise.
    """

    def __init__(
        self,
        *,
        worker_id: int,
        secret: bytes,
        bind_host: str = "127.0.0.1",
        transport: str = "auto",
        timeout_s: float = 1800.0,
    ) -> None:
        """Listen for other workers; nothing can be sent before ``reconfigure``.

        Args:
            worker_id: unique among all workers that the job ever has.
            secret: that of the job. Who does not know it cannot connect.
            bind_host: name or address of an interface that all peers can reach.
            transport: "auto" (shared memory on one host, else TCP) or "tcp".
            timeout_s: for collectives of groups that do not name their own.
        """
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {TRANSPORTS}, not {transport}")
        self.worker_id = worker_id
        self.timeout_s = timeout_s
        self._pid = os.getpid()
        self._native = _C.Mesh(worker_id, secret, bind_host, transport == "auto")
        # No thread of ours may be left when the interpreter is taken down.
        atexit.register(_close, weakref.ref(self))

    @property
    def address(self) -> str:
        """Where others reach this worker; opaque, printable."""
        return self._native.address

    @property
    def failure_fd(self) -> int:
        """An eventfd that is readable while a failure is latched."""
        return self._native.failure_fd

    @property
    def epoch(self) -> int:
        """The current epoch, or -1 before the first ``reconfigure``."""
        return self._native.epoch

    @property
    def rank(self) -> int:
        """The global rank that this worker holds, or -1."""
        return self._native.rank

    @property
    def world_size(self) -> int:
        """Number of ranks of the current membership, or 0."""
        return self._native.world_size

    def reconfigure(
        self, epoch: int, rank: int, members: Sequence[tuple[int, str]]
    ) -> int:
        """Move to a newer epoch: fence the old one and clear a latched failure.

        Args:
            epoch: must be newer than the current one, else StaleEpoch.
            rank: the rank of this worker.
            members: ``members[r]`` is the worker id and the address of rank r.

        Returns:
            How many links are replaced: dialled anew because the rank has another
            worker and a link to the former one was open, or because the link to a
            living worker had broken.
        """
        return self._native.reconfigure(epoch, rank, list(members))

    def lock_membership(self) -> None:
        """From here on no verb of a group moves the mesh, only ``reconfigure``.

        For a job whose manager numbers the epochs.
        """
        self._native.lock_membership()

    def fence(self, reason: str, lost_rank: int = -1) -> None:
        """Latch a failure from outside: cancel all until the next ``reconfigure``."""
        self._native.fence(reason, lost_rank)

    def failure(self) -> Failure | None:
        """Return the latched failure, or None."""
        return self._native.failure()

    def absorb(self, on: bool) -> None:
        """Let operations that fail complete as if they had not, or end that."""
        self._native.absorb(on)

    @property
    def absorbs_failure(self) -> bool:
        """Whether a failure is latched, and absorbed."""
        return self._native.absorbs_failure

    def start_recording(self) -> None:
        """Keep the results of small operations from here on."""
        self._native.start_recording()

    def stop_recording(self) -> bytes:
        """Return the set-up log, and record no longer."""
        return self._native.stop_recording()

    def start_replay(self, log: bytes) -> None:
        """Answer operations from a set-up log. ValueError if it is malformed."""
        self._native.start_replay(log)

    def hold_replay(self, on: bool) -> None:
        """While on, run operations over the links: they are not replayed or recorded.

        For what a newcomer does together with the others in the middle of its set-up.
        """
        self._native.hold_replay(on)

    def stop_replay(self) -> None:
        """Run operations over the links from here on."""
        self._native.stop_replay()

    def counters(self) -> dict[str, int]:
        """Return how much has happened since the mesh was made."""
        return self._native.counters()

    def pending(self) -> list[PendingOperation]:
        """Return what is in flight now, oldest first: what this rank waits for.

        Of use from another thread while the main one hangs.
        """
        return [
            PendingOperation(
                kind, group, number, num_bytes, dtype, age_s, time_s, tuple(ranks)
            )
            for kind, group, number, num_bytes, dtype, age_s, time_s, ranks in (
                self._native.pending()
            )
        ]

    def finished(self) -> list[FinishedOperation]:
        """Return the last operations that were in flight and ended, oldest first.

        At most 256. The sequence numbers of a group's collectives are the same on
        all ranks: the rank whose last is lower is the one that the others wait for.
        """
        return [FinishedOperation(*each) for each in self._native.finished()]

    def close(self) -> None:
        """End all operations and tell the peers that this is no failure."""
        self._native.close()


def _close(reference: "weakref.ref[Mesh]") -> None:
    mesh = reference()
    # In a forked child the parent's mesh is not ours to close.
    if mesh is not None and mesh._pid == os.getpid():
        mesh.close()


def create_group(
    mesh: Mesh,
    name: str,
    global_ranks: Sequence[int],
    timeout_s: float,
    absorb: bool = True,
    is_world: bool = False,
    uuid: int = -1,
) -> Backend:
    """Return a c10d backend for a group that this process is a member of.

    No communication: all members make it, with the same name and ranks, in any order.

    Args:
        mesh: seated, that is, ``reconfigure`` has been called.
        name: tells groups with the same ranks apart.
        global_ranks: in the order of the group's own ranks.
        timeout_s: for each of its operations.
        absorb: whether its failures may be absorbed, and its operations recorded
            and replayed. False for the groups that recovery itself uses.
        is_world: whether to reconfigure it is to reconfigure the mesh.
        uuid: tells it from others of the same name and ranks. Where it is left out,
            all members must have made and closed as many of these.
    """
    ranks = list(global_ranks)
    return _C.create_group(mesh._native, name, ranks, timeout_s, absorb, is_world, uuid)


def create_device_group(
    mesh: Mesh,
    name: str,
    global_ranks: Sequence[int],
    timeout_s: float,
    *,
    is_world: bool = False,
    uuid: int = -1,
    device_type: str,
    store: Store,
    make: Callable[[Store, int, int], Backend],
) -> _C.DeviceBackend:
    """As ``create_group``, for tensors on devices as well as in host memory.

    What a newcomer needs of a set-up goes over the mesh; all else on devices is moved
    by a backend that the group has made at its first use.

    Args:
        mesh: as for ``create_group``, and so are name, global_ranks, timeout_s,
            is_world and uuid.
        device_type: as ``torch.device(...).type``.
        store: by which the ranks of one such backend find each other.
        make: makes one, with a store of its own, for a rank of so many. All members
            call it; nobody waits in that store for a rank that is lost.
    """

    def store_of(key: int, life: int) -> Store:
        return _C.FencedStore(f"mnemosyne/{key}/{life}", store, mesh._native)

    def make_one(key: int, life: int, rank: int, size: int) -> Backend:
        return make(store_of(key, life), rank, size)

    def meet(key: int, life: int, size: int) -> None:
        own = store_of(key, life)
        if own.add("mnemosyne/here", 1) == size:
            own.set("mnemosyne/all", "")
        own.wait(["mnemosyne/all"])

    return _C.create_device_group(
        mesh._native,
        name,
        list(global_ranks),
        timeout_s,
        is_world,
        uuid,
        device_type,
        make_one,
        meet,
    )
