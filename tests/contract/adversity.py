"""What the workers of test_adversity.py do: harm themselves, and try to go on."""

import ctypes
import os
import resource
import select
import socket
import struct
from typing import Any

import torch
from world import Worker

from mnemosyne_plugin.ccl import Mesh, create_group
from mnemosyne_plugin.errors import CollectiveTimeout, PeerLost, StaleEpoch

FAILURES = (PeerLost, StaleEpoch, CollectiveTimeout)


def all_reduce(worker: Worker, numel: int = 10) -> float:
    tensor = torch.full((numel,), float(worker.rank + 1))
    worker.group().allreduce([tensor]).wait()
    assert bool((tensor == tensor[0]).all())
    return float(tensor[0])


def connect(worker: Worker, timeout_s: float = 30.0) -> list[float]:
    """Use the links to all others, and open those that are not."""
    group = worker.group(f"connect {timeout_s}", timeout_s=timeout_s)
    got = torch.empty(worker.size)
    mine = torch.full((worker.size,), float(worker.rank))
    group.alltoall_base(got, mine, [], []).wait()
    return got.tolist()


def try_to(worker: Worker, function: Any, *args: Any) -> tuple[str, int, str]:
    """Return the error that a function ends with: its type, rank and text."""
    try:
        function(worker, *args)
    except FAILURES as error:
        return type(error).__name__, error.rank, str(error)
    return "nothing", -1, ""


def work_until_failure(worker: Worker, numel: int) -> tuple[str, int, str]:
    while True:
        failure = try_to(worker, all_reduce, numel)
        if failure[0] != "nothing":
            return failure


def await_failure(worker: Worker, timeout_s: float = 20.0) -> tuple[str, int]:
    """Wait for a failure without any operation in flight."""
    select.select([worker.mesh.failure_fd], [], [], timeout_s)
    failure = worker.mesh.failure()
    return type(failure).__name__, -1 if failure is None else failure.rank


def receive(worker: Worker, peer: int, timeout_s: float) -> None:
    group = worker.group(f"impatient {timeout_s}", timeout_s=timeout_s)
    group.recv([torch.zeros(1)], peer, 0).wait()


def reduce_in_time(worker: Worker, numel: int, timeout_s: float) -> None:
    group = worker.group(f"impatient {timeout_s}", timeout_s=timeout_s)
    group.allreduce([torch.ones(numel)]).wait()


def identity(worker: Worker) -> tuple[int, int]:
    return os.getpid(), id(worker.group())


def counters(worker: Worker) -> dict[str, int]:
    return worker.mesh.counters()


def holdings(worker: Worker) -> tuple[int, int]:
    """Descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


# ---------------------------------------------------------------- cutting links


def names_of_links(worker: Worker) -> dict[int, tuple[Any, Any]]:
    """The TCP connections of this process: descriptor, and both ends."""
    found = {}
    for fd, one in open_sockets():
        if one.family == socket.AF_INET:
            found[fd] = (one.getsockname(), one.getpeername())
    return found


def cut_shm(worker: Worker, peer_pid: int, how: int) -> int:
    """Shut down the doorbell of the link to a process."""
    cut = 0
    for _, one in open_sockets():
        if one.family != socket.AF_UNIX:
            continue
        credentials = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        is_ours = not (one.getsockname() and one.getpeername())
        if struct.unpack("3i", credentials)[0] == peer_pid and is_ours:
            one.shutdown(how)
            cut += 1
    return cut


def cut_tcp(worker: Worker, fd: int, how: int) -> int:
    duplicate = socket.socket(fileno=os.dup(fd))
    with duplicate:
        duplicate.shutdown(how)
    return 1


def reset_tcp(worker: Worker, fd: int, _how: int) -> int:
    """Send a RST: what connect to AF_UNSPEC does to a connection, see connect(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = struct.pack("=H14x", socket.AF_UNSPEC)
    assert libc.connect(fd, address, len(address)) == 0, ctypes.get_errno()
    return 1


def open_sockets() -> list[tuple[int, socket.socket]]:
    """Duplicates of all connected stream sockets of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            one.getpeername()
            found.append((int(name), one))
        except OSError:
            one.close()
    return found


# ---------------------------------------------------------------- exhaustion


def limit_descriptors(worker: Worker, spare: int) -> None:
    """Leave room for so many more descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    # The limit is on numbers: fill the gaps, so that it is one on the count.
    worker.kept["fillers"] = []
    while True:
        fd = os.dup(0)
        if fd > used[-1]:
            os.close(fd)
            break
        worker.kept["fillers"].append(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + spare, hard))


def limit_shared_memory(worker: Worker, size_bytes: int) -> None:
    """A memfd is a file: it cannot be larger than that."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))


def lift_limits(worker: Worker) -> None:
    for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (hard, hard))
    for fd in worker.kept.pop("fillers", []):
        os.close(fd)


# ---------------------------------------------------------------- who is no member


def intrude(
    worker: Worker, secret: bytes, epoch: int, members: list[tuple[int, str]]
) -> tuple[str, int, str]:
    """Act as rank 0 with a mesh of one's own, and send to the last rank."""
    intruder = Mesh(worker_id=10_000, secret=secret)
    seats = [(10_000, intruder.address), *members[1:]]
    intruder.reconfigure(epoch, 0, seats)
    group = create_group(intruder, "world", range(len(seats)), 20.0)
    try:
        group.send([torch.ones(1)], len(seats) - 1, 0).wait()
        group.recv([torch.ones(1)], len(seats) - 1, 0).wait()
    except FAILURES as error:
        return type(error).__name__, error.rank, str(error)
    finally:
        intruder.close()
    return "nothing", -1, ""


def pretend(worker: Worker, epoch: int) -> tuple[str, int, str]:
    """Go on as a member of a membership that this worker is no part of."""
    worker.mesh.reconfigure(epoch, worker.rank, worker.kept["members"])
    return try_to(worker, receive, (worker.rank + 1) % worker.size, 5.0)


def remember(worker: Worker, members: list[tuple[int, str]]) -> None:
    worker.kept["members"] = members
