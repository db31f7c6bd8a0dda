"""What stands in for NCCL where there is no GPU: host memory is the device."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mnemosyne_plugin.ccl import Mesh, create_group
from mnemosyne_plugin.ccl.devices import Devices


def gloo() -> Devices:
    """Return torch's own; it cannot be aborted."""

    def make(store: Any, rank: int, size: int, timeout: timedelta, _: Any) -> Any:
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    return Devices("cpu", make)


meshes: list[Mesh] = []
"""Those that ``links`` has made in this process, oldest first."""


def links() -> Devices:
    """Return what has links of its own for each group, and ends when it is aborted."""

    def make(store: Any, rank: int, size: int, timeout: timedelta, _: Any) -> Any:
        mesh = Mesh(worker_id=rank + 1, secret=b"of a stand-in")
        meshes.append(mesh)
        store.set(str(rank), mesh.address)
        addresses = [store.get(str(other)).decode() for other in range(size)]
        mesh.reconfigure(1, rank, [(n + 1, each) for n, each in enumerate(addresses)])
        return create_group(
            mesh,
            "stand-in",
            range(size),
            timeout.total_seconds(),
            absorb=False,
        )

    return Devices("cpu", make)
