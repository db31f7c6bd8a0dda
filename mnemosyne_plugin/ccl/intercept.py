"""Serves the process groups that a script asks torch.distributed for.

Both trainers create their groups by ``init_process_group`` and ``new_group``; whatever
CPU backend they name, they get ours. A newcomer must not wait in the store barriers of
a set-up that the others have left behind.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from mnemosyne_plugin.errors import ConfigError

BACKEND = "mnemosyne"


def serve_process_groups(is_alone: Callable[[], bool]) -> None:
    """Give our backend to every group from now on.

    is_alone: whether this process runs the set-up by itself, without peers to wait for.
    """
    for name in ("init_process_group", "new_group"):
        wrapper = _with_our_backend(getattr(c10d, name))
        setattr(c10d, name, wrapper)
        setattr(torch.distributed, name, wrapper)
    barrier = c10d._store_based_barrier

    @functools.wraps(barrier)
    def store_based_barrier(*args: Any, **kwargs: Any) -> None:
        if not is_alone():
            barrier(*args, **kwargs)

    c10d._store_based_barrier = store_based_barrier


def group_ids() -> list[int]:
    """Return the identities of all live ProcessGroup objects, oldest first."""
    return [id(group) for group in c10d._world.pg_map]


def num_collectives() -> int:
    """Return how many operations this process has begun on its groups."""
    cpu = torch.device("cpu")
    backends: list[Any] = [group._get_backend(cpu) for group in c10d._world.pg_map]
    return sum(backend._get_sequence_number_for_group() for backend in backends)


def our_backend(requested: str | None) -> str | None:
    """Return the backend to use where a script asks for ``requested``."""
    if requested is None:
        return None
    served = {"gloo", BACKEND}
    names = [part.rpartition(":") for part in requested.lower().split(",")]
    cpu_names = {name for device, _, name in names if device in ("", "cpu")}
    if any(name == "nccl" and device == "" for device, _, name in names):
        raise ConfigError(
            "this version protects CPU process groups only, and the script asks for "
            "'nccl'; run it with torchrun, or with backend 'gloo' on the CPU"
        )
    return BACKEND if cpu_names <= served and cpu_names else requested


def _with_our_backend(function: Callable[..., Any]) -> Callable[..., Any]:
    # backend is the first argument of init_process_group, the third of new_group;
    # a new_group without one takes that of the default group.
    is_init = function.__name__ == "init_process_group"
    place = 0 if is_init else 2
    default = BACKEND if is_init else None

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            backend = our_backend(args[place]) or default
            args = (*args[:place], backend, *args[place + 1 :])
        else:
            kwargs["backend"] = our_backend(kwargs.get("backend")) or default
        return function(*args, **kwargs)

    return wrapper
