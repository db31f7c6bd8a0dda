"""The control group: all ranks, for votes, reports and transfers. Never absorbed."""

import math
from typing import Any

import torch
import torch.distributed as dist

from mnemosyne_plugin import ccl

_TIMEOUT_S = 1800.0  # as c10d's default: set-up of a large model takes minutes


class Port:
    """Point-to-point between all ranks, for ``state``."""

    def __init__(
        self, mesh: ccl.Mesh, world_size: int, name: str, timeout_s: float
    ) -> None:
        self._world_size = world_size
        self._backend: Any = ccl.create_group(
            mesh, name, range(world_size), timeout_s=timeout_s, absorb=False
        )

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Any:
        """Start sending; the returned work has ``wait``."""
        return self._backend.send(tensors, dst, tag)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any:
        """Start receiving; the returned work has ``wait``."""
        return self._backend.recv(tensors, src, tag)


class ControlGroup(Port):
    """Adds small collectives, and a port for receives that may never be answered."""

    def __init__(self, mesh: ccl.Mesh, world_size: int) -> None:
        super().__init__(mesh, world_size, "mnemosyne", _TIMEOUT_S)
        self.standing = Port(mesh, world_size, "mnemosyne-standing", math.inf)

    def minimum(self, *values: int) -> list[int]:
        """Return the minimum over all ranks of each value. Collective."""
        ballot = torch.tensor(values, dtype=torch.int64)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._backend.allreduce([ballot], options).wait()
        return [int(value) for value in ballot]

    def maximum(self, value: int) -> int:
        """Return the maximum over all ranks. Collective."""
        return -self.minimum(-value)[0]

    def gather(self, blob: bytes) -> list[bytes]:
        """Return every rank's ``blob``, by rank. Collective."""
        length = torch.tensor([len(blob)], dtype=torch.int64)
        lengths = [torch.zeros_like(length) for _ in range(self._world_size)]
        self._backend.allgather([lengths], [length]).wait()
        sizes = [int(item) for item in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(blob)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        parts = [torch.zeros_like(padded) for _ in range(self._world_size)]
        self._backend.allgather([parts], [padded]).wait()
        return [bytes(p[:n].numpy()) for p, n in zip(parts, sizes, strict=True)]
