"""Processes that hold process groups, of which one can be killed and replaced.

Three ways to have the groups back: our mesh is reconfigured; gloo's groups are made
anew through torch.distributed, as its users do; or they are made anew as bare
ProcessGroupGloo objects, the least that gloo allows.
"""

import multiprocessing
import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist

from mnemosyne_plugin.ccl import Mesh, register

WAYS = ("mnemosyne", "torch.distributed", "ProcessGroupGloo")
TIMEOUT = timedelta(seconds=300)
# A handshake makes a link; the mesh counts the bytes of frames only.
HANDSHAKE_BYTES = 88 + 80 + 32 + 1

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "replaceable"])


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One replacement of one rank, as all ranks saw it together."""

    linked_ms: float  # until all ranks were through a barrier of the world
    reduced_ms: float  # until all ranks had reduced on every group
    links_replaced: int  # each counted once
    links_kept: int
    bytes_sent: int  # until the barrier was over, by all ranks together


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw of a repair; times are of the monotonic clock."""

    linked_s: float
    reduced_s: float
    links_replaced: int = 0
    links_opened: int = 0
    links_open: int = 0
    bytes_sent: int = 0


class Rank:
    """In the process of a rank: its groups, by one of the ways."""

    def __init__(self, way: str, worker_id: int, port: int) -> None:
        self.way = way
        self.worker_id = worker_id
        self.groups: list[Any] = []
        self._counted: dict[str, int] = defaultdict(int)  # at the end of the last move
        self._is_newcomer = False
        if way == "mnemosyne":
            self.mesh = Mesh(worker_id=worker_id, secret=b"benchmark")
            register(lambda: self.mesh, lambda: self._is_newcomer)
        self.store = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False
        )

    @property
    def address(self) -> str:
        return self.mesh.address if self.way == "mnemosyne" else ""

    def move(self, epoch: int, members: list[tuple[int, str]], num: int) -> Seen:
        """Have ``num`` groups of all ranks again, and use each of them once."""
        rank = [worker_id for worker_id, _ in members].index(self.worker_id)
        size = len(members)
        if self.way == "mnemosyne":
            return self._reconfigure(epoch, rank, members, num)
        if self.way == "torch.distributed":
            if dist.is_initialized():
                dist.destroy_process_group()
            self._initialize("gloo", epoch, rank, size)
            dist.barrier()
            linked = time.monotonic()
            self._add_groups(num)
        else:
            self.groups = [self._bare_group(f"{epoch}/0", rank, size)]
            self.groups[0].barrier().wait()
            linked = time.monotonic()
            for name in range(1, num):
                group = self._bare_group(f"{epoch}/{name}", rank, size)
                self.groups.append(group)
        self._reduce(rank, size)
        return Seen(linked_s=linked, reduced_s=time.monotonic())

    def _reconfigure(
        self, epoch: int, rank: int, members: list[tuple[int, str]], num: int
    ) -> Seen:
        before = self._counted
        replaced = self.mesh.reconfigure(epoch, rank, members)
        if not self.groups:
            self._is_newcomer = epoch > 1
            self._initialize("mnemosyne", epoch, rank, len(members))
        self._connect()
        linked = time.monotonic()
        after = self.mesh.counters()
        self._add_groups(num)
        self._reduce(rank, len(members))
        reduced = time.monotonic()
        self._counted = self.mesh.counters()
        return Seen(
            linked_s=linked,
            reduced_s=reduced,
            links_replaced=replaced,
            links_opened=after["links_opened"] - before["links_opened"],
            links_open=after["links_open"],
            bytes_sent=after["bytes_sent"] - before["bytes_sent"],
        )

    def _connect(self) -> None:
        # A barrier that uses every link: each rank hears from each.
        size = self.mesh.world_size
        ones = torch.ones(size)
        dist.all_to_all_single(torch.empty(size), ones)

    def _initialize(self, backend: str, epoch: int, rank: int, size: int) -> None:
        # Gloo's groups are made anew in each epoch, ours are the same in all.
        prefix = str(epoch) if backend == "gloo" else "ours"
        store = dist.PrefixStore(prefix, self.store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
        self.groups = [dist.group.WORLD]

    def _add_groups(self, num: int) -> None:
        while len(self.groups) < num:
            self.groups.append(dist.new_group())

    def _bare_group(self, name: str, rank: int, size: int) -> Any:
        store = dist.PrefixStore(name, self.store)
        return dist.ProcessGroupGloo(store, rank, size, TIMEOUT)

    def _reduce(self, rank: int, size: int) -> None:
        for group in self.groups:
            tensor = torch.full((4,), float(rank))
            group.allreduce([tensor]).wait()
            assert float(tensor[0]) == size * (size - 1) / 2, tensor


def serve(pipe: Connection, way: str, worker_id: int, port: int) -> None:
    """Do what the driver asks until it is gone."""
    torch.set_num_threads(1)
    rank = Rank(way, worker_id, port)
    pipe.send(rank.address)
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            break
        pipe.send(rank.move(*command))
    # Not through destructors: gloo's groups would wait for those who died.
    os._exit(0)


class Ranks:
    """``size`` processes with ``num_groups`` groups of all ranks, made by one way."""

    def __init__(self, way: str, size: int, num_groups: int) -> None:
        self.num_groups = num_groups
        self._way = way
        self._epoch = 0
        self._num_workers = 0
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._members: list[tuple[int, str]] = []
        started = [self._start() for _ in range(size)]
        for pipe, process, worker_id in started:
            self._pipes.append(pipe)
            self._processes.append(process)
            self._members.append((worker_id, pipe.recv()))
        self._move()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()  # nothing, if it has ended

    def replace(self, rank: int) -> Repair:
        """Kill a rank; when its successor is ready, let all have their groups again."""
        os.kill(self._processes[rank].pid, signal.SIGKILL)
        self._processes[rank].join()
        pipe, process, worker_id = self._start()
        self._pipes[rank].close()
        self._pipes[rank], self._processes[rank] = pipe, process
        self._members[rank] = (worker_id, pipe.recv())
        start, seen = self._move()
        opened = sum(one.links_opened for one in seen)
        links = sum(one.links_open for one in seen) // 2
        replaced = sum(one.links_replaced for one in seen)
        return Repair(
            linked_ms=1e3 * (max(one.linked_s for one in seen) - start),
            reduced_ms=1e3 * (max(one.reduced_s for one in seen) - start),
            links_replaced=replaced,
            links_kept=links - opened // 2,
            bytes_sent=sum(one.bytes_sent for one in seen) + replaced * HANDSHAKE_BYTES,
        )

    def _start(self) -> tuple[Connection, Any, int]:
        self._num_workers += 1
        worker_id = self._num_workers
        ours, theirs = _context.Pipe()
        process = _context.Process(
            target=serve,
            args=(theirs, self._way, worker_id, self._store.port),
            daemon=True,
        )
        process.start()
        theirs.close()
        return ours, process, worker_id

    def _move(self) -> tuple[float, list[Seen]]:
        self._epoch += 1
        command = (self._epoch, self._members, self.num_groups)
        message = bytes(ForkingPickler.dumps(command))
        start = time.monotonic()
        for pipe in self._pipes:
            pipe.send_bytes(message)
        return start, [pipe.recv() for pipe in self._pipes]
