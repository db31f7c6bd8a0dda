"""Makes torch.distributed create our groups when asked for backend "mnemosyne"."""

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Backend, PrefixStore, Store

from mnemosyne_plugin.ccl.devices import Devices
from mnemosyne_plugin.ccl.intercept import serve_by_name
from mnemosyne_plugin.ccl.mesh import Mesh, create_device_group, create_group
from mnemosyne_plugin.ccl.verbs import mesh_ranks_of_default_group
from mnemosyne_plugin.errors import ConfigError

BACKEND = "mnemosyne"


def register(
    mesh_provider: Callable[[], Mesh],
    is_alone: Callable[[], bool] = lambda: False,
    devices: Devices | None = None,
) -> None:
    """Register the c10d backend "mnemosyne" for tensors in host memory. Idempotent.

    ``mesh_provider`` is called for each new group and returns the seated mesh. The
    first one stays. ``is_alone``: whether this process runs a set-up by itself that
    others have behind them. ``devices``: whose tensors it moves, too.
    """
    if BACKEND.upper() in dist.Backend._plugins:
        return

    def create(options: Any, backend_options: Any) -> Any:
        mesh = mesh_provider()
        ranks = list(options.global_ranks_in_group)
        timeout_s = options.timeout.total_seconds()
        is_world = not ranks
        if is_world:
            if options.group_size != mesh.world_size:
                raise ConfigError(
                    f"world_size is {options.group_size}, but the mesh has "
                    f"{mesh.world_size} members"
                )
            ranks = list(range(mesh.world_size))
        elif (world := mesh_ranks_of_default_group()) is not None:
            ranks = [world[rank] for rank in ranks]
        uuid = _agree_on_uuid(options, ranks, is_alone())
        name = options.group_id
        if devices is None:
            return create_group(
                mesh, name, ranks, timeout_s, is_world=is_world, uuid=uuid
            )

        def make(store: Store, rank: int, size: int) -> Backend:
            return devices.make(store, rank, size, options.timeout, backend_options)

        return create_device_group(
            mesh,
            name,
            ranks,
            timeout_s,
            is_world=is_world,
            uuid=uuid,
            device_type=devices.type,
            store=options.store,
            make=make,
        )

    serve_by_name()
    types = ["cpu"] if devices is None else list({"cpu", devices.type})
    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=types)


def _agree_on_uuid(options: Any, ranks: list[int], is_alone: bool) -> int:
    """Return a number that all members of the new group have, and no other group.

    A script may destroy its groups and make them again, with some ranks in workers that
    have seen none of it: without this, a message of the former group could be taken for
    one of the new. Each rank counts its own makings in the store, so that they agree on
    which one it is.
    """
    # Disjoint groups of one name share a store.
    whose = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    store = PrefixStore(f"mnemosyne/{whose}", options.store)
    count = store.add(f"made/{options.group_rank}", 0 if is_alone else 1)
    if options.group_rank == 0 and not is_alone:
        store.set(f"uuid/{count}", str(secrets.randbits(62)))
    return int(store.get(f"uuid/{count}"))
