"""Serves the process groups that a script asks torch.distributed for.

Both trainers create their groups by ``init_process_group`` and ``new_group``; whatever
CPU backend they name, they get ours. A newcomer must not wait in the store barriers of
a set-up that the others have left behind.
"""

import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import constants
from torch.distributed import distributed_c10d as c10d

from mnemosyne_plugin.errors import ConfigError

BACKEND = "mnemosyne"


def serve_process_groups(
    is_alone: Callable[[], bool], has_devices: bool = False
) -> None:
    """Give our backend to every group from now on.

    is_alone: whether this process runs the set-up by itself, without peers to wait for.
    has_devices: our backend moves what lies on them, too.
    """

    asked: list[str | None] = []
    for name in ("init_process_group", "new_group"):
        wrapper = _with_our_backend(getattr(c10d, name), has_devices, asked)
        setattr(c10d, name, wrapper)
        setattr(torch.distributed, name, wrapper)
    barrier = c10d._store_based_barrier

    @functools.wraps(barrier)
    def store_based_barrier(*args: Any, **kwargs: Any) -> None:
        if not is_alone():
            barrier(*args, **kwargs)

    c10d._store_based_barrier = store_based_barrier


def serve_by_name() -> None:
    """Let ours do what torch gives to gloo alone, by its name. Idempotent."""
    for name, with_ours in _BY_NAME.items():
        function = getattr(c10d, name)
        if hasattr(function, "of_gloo"):
            continue
        wrapper = with_ours(function)
        wrapper.of_gloo = function
        setattr(c10d, name, wrapper)
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, wrapper)


def group_ids() -> list[int]:
    """Return the identities of all live ProcessGroup objects, oldest first."""
    return [id(group) for group in c10d._world.pg_map]


def num_collectives() -> int:
    """Return how many operations this process has begun on its groups."""
    backends: list[Any] = [
        group._get_backend(device)
        for group in c10d._world.pg_map
        for device in group._device_types
    ]
    return sum(backend._get_sequence_number_for_group() for backend in backends)


def our_backend(requested: str | None, has_devices: bool = False) -> str | None:
    """Return the backend to use where a script asks for ``requested``."""
    if requested is None:
        return None
    served = {"gloo", BACKEND}
    if has_devices:
        served.add("nccl")
        if {name.rpartition(":")[2] for name in requested.lower().split(",")} <= served:
            return BACKEND
    names = [part.rpartition(":") for part in requested.lower().split(",")]
    cpu_names = {name for device, _, name in names if device in ("", "cpu")}
    if any(name == "nccl" and device == "" for device, _, name in names):
        raise ConfigError(
            "this version protects CPU process groups only, and the script asks for "
            "'nccl'; run it with torchrun, with backend 'gloo' on the CPU, with "
            "`mnemosyne run --device-proxy` (docs/proxy.md), or with "
            "MNEMOSYNE_DEVICE_GROUPS=nccl (docs/design.md); the last two have not met "
            "a GPU yet"
        )
    return BACKEND if cpu_names <= served and cpu_names else requested


def _our_group(group: Any) -> Any:
    """Return the group if this rank is in it and it is ours, else None."""
    if c10d._rank_not_in_group(group):
        return None
    group = group or c10d._get_default_group()
    cpu = torch.device("cpu")
    if cpu not in group._device_types or group._get_backend(cpu).name() != BACKEND:
        return None
    return group


def _with_monitored_barrier(function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def monitored_barrier(
        group: Any = None,
        timeout: timedelta | float | None = None,
        wait_all_ranks: bool = False,
    ) -> None:
        ours = _our_group(group)
        if ours is None:
            function(group, timeout, wait_all_ranks)
        elif timeout is None:
            ours.monitored_barrier(wait_all_ranks=wait_all_ranks)
        else:
            if not isinstance(timeout, timedelta):
                timeout = timedelta(seconds=timeout)
            ours.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)

    return monitored_barrier


def _with_pg_timeout(function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def _set_pg_timeout(timeout: timedelta, group: Any = None) -> None:
        ours = _our_group(group)
        if ours is None:
            function(timeout, group)
        else:
            ours.set_timeout(timeout)

    return _set_pg_timeout


_BY_NAME = {
    "monitored_barrier": _with_monitored_barrier,
    "_set_pg_timeout": _with_pg_timeout,
}


def _with_our_backend(
    function: Callable[..., Any], has_devices: bool, asked: list[str | None]
) -> Callable[..., Any]:
    """asked: what init_process_group was asked for, the last time."""
    # A new_group without a backend takes that of the default group.
    is_init = function.__name__ == "init_process_group"
    default = BACKEND if is_init else None
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        requested = given.get("backend")
        if is_init:
            asked[:] = [requested]
        given["backend"] = our_backend(requested, has_devices) or default
        # torch's default depends on the name.
        name = (requested or asked[0]) if asked else requested
        if str(name).lower() == "nccl" and given.get("timeout") is None:
            given["timeout"] = constants.default_pg_nccl_timeout
        return function(**given)

    return wrapper
