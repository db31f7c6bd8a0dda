"""Makes torch.distributed create our groups when asked for backend "mnemosyne"."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mnemosyne_plugin.ccl.mesh import Mesh, create_group

BACKEND = "mnemosyne"


def register(mesh_provider: Callable[[], Mesh]) -> None:
    """Register the c10d backend "mnemosyne" for CPU tensors. Idempotent.

    ``mesh_provider`` is called for each new group and returns the seated mesh. The
    first one stays.
    """
    if BACKEND.upper() in dist.Backend._plugins:
        return

    def create(options: Any, _backend_options: Any) -> Any:
        mesh = mesh_provider()
        ranks = list(options.global_ranks_in_group) or list(range(mesh.world_size))
        timeout_s = options.timeout.total_seconds()
        return create_group(mesh, options.group_id, ranks, timeout_s)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu"])
