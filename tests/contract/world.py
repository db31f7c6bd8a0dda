"""Real processes, each with a mesh, that run the functions a test gives them."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import stand_in
import torch
import torch.distributed as dist

from mnemosyne_plugin.ccl import Mesh, create_group, register

SECRET = b"a secret of the tests"
CALL_TIMEOUT_S = 45.0

# Forks from a process that has imported torch already, and what DDP imports at its
# first use: a worker takes milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "world"])


@dataclass
class Worker:
    """What the functions of a test find in a worker process."""

    mesh: Mesh
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def size(self) -> int:
        return self.mesh.world_size

    def group(self, name: str = "world", timeout_s: float = 30.0, **kw: Any) -> Any:
        """Return the group of all ranks with that name; always the same object."""
        if name not in self.kept:
            ranks = range(self.size)
            self.kept[name] = create_group(self.mesh, name, ranks, timeout_s, **kw)
        return self.kept[name]


def _serve(pipe: Connection, worker_id: int, transport: str) -> None:
    torch.set_num_threads(1)
    if transport == "device":
        # Its groups have gloo, in host memory, in the place of NCCL.
        mesh = Mesh(worker_id=worker_id, secret=SECRET)
        devices = stand_in.gloo()
    else:
        mesh = Mesh(worker_id=worker_id, secret=SECRET, transport=transport)
        devices = None
    register(lambda: mesh, devices=devices)
    worker = Worker(mesh)
    pipe.send(("ok", mesh.address))
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            reply = ("ok", function(worker, *args))
        except BaseException as error:
            reply = ("error", (error, traceback.format_exc()))
        try:
            pipe.send(reply)
        except Exception as error:  # what cannot be pickled
            pipe.send(("error", (RuntimeError(repr(reply)), repr(error))))
    if dist.is_initialized():
        dist.destroy_process_group()


def _seat(worker: Worker, epoch: int, rank: int, members: list[Any]) -> int:
    return worker.mesh.reconfigure(epoch, rank, members)


class World:
    """``size`` workers over one transport: one of the mesh's, or "device"."""

    def __init__(self, size: int, transport: str) -> None:
        self.transport = transport
        self.epoch = 0
        self._next_id = 1
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._members: list[tuple[int, str]] = []
        for rank in range(size):
            self.replace(rank)
        self.seat()

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
                if error is None:
                    raise AssertionError("a worker did not end by itself")

    def pid(self, rank: int) -> int:
        return int(self._processes[rank].pid)

    def kill(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGKILL)
        self._processes[rank].join()

    def stop(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGCONT)

    def replace(self, rank: int) -> None:
        """Start a new worker for the rank; it is seated by the next ``seat``."""
        ours, theirs = _context.Pipe()
        process = _context.Process(
            target=_serve, args=(theirs, self._next_id, self.transport), daemon=True
        )
        process.start()
        theirs.close()
        lists: Sequence[list[Any]] = (self._pipes, self._processes, self._members)
        for one, item in zip(lists, (ours, process, None), strict=True):
            if rank < len(one):
                one[rank] = item
            else:
                one.append(item)
        self._members[rank] = (self._next_id, self._reply(rank))
        self._next_id += 1

    def heal(self) -> None:
        """Replace those who died, and move on."""
        for rank, process in enumerate(self._processes):
            if not process.is_alive():
                self.replace(rank)
        self.seat()

    def seat(self) -> list[int]:
        """Move all to the next epoch; return how many links each has replaced."""
        self.epoch += 1
        for rank, pipe in enumerate(self._pipes):
            pipe.send((_seat, (self.epoch, rank, self._members)))
        return [self._reply(rank) for rank in range(len(self._pipes))]

    def start(self, function: Callable[..., Any], *args: Any, ranks: Any) -> None:
        """Let some ranks run ``function(worker, *args)``; see ``results``."""
        for rank in ranks:
            self._pipes[rank].send((function, args))

    def results(self, ranks: Any) -> list[Any]:
        """Return what the ranks replied, or raise the first error among that.

        All replies are read first: what is left in a pipe would be taken for the
        answer to the next question.
        """
        replies, errors = [], []
        for rank in ranks:
            try:
                replies.append(self._reply(rank))
            except (RuntimeError, TimeoutError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return replies

    def run(self, function: Callable[..., Any], *args: Any, ranks: Any = None) -> Any:
        """Run ``function(worker, *args)`` on ranks at the same time, all by default."""
        ranks = range(len(self._pipes)) if ranks is None else list(ranks)
        self.start(function, *args, ranks=ranks)
        return self.results(ranks)

    def _reply(self, rank: int) -> Any:
        pipe = self._pipes[rank]
        if not pipe.poll(CALL_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} does not answer")
        kind, value = pipe.recv()
        if kind == "error":
            error, trace = value
            raise RuntimeError(f"rank {rank}: {trace}") from error
        return value
