"""torch 2.14's verbs of reconfiguration, for every torch that we support.

The same names and meaning as ``torch.distributed._supports_reconfigure`` and its
neighbours. The ProcessGroup object stays, and so does its name.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend
from torch.distributed import distributed_c10d as c10d

from mnemosyne_plugin.ccl import _C
from mnemosyne_plugin.errors import ConfigError


def supports_reconfigure(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether the group, or the default one, is ours."""
    return isinstance(_backend_of(_group(group)), _C.MnemosyneBackend)


def get_reconfigure_handle(group: dist.ProcessGroup | None = None) -> str:
    """Return what names this worker to others; good until the next epoch."""
    return _ours(_group(group)).get_reconfigure_handle()


def reconfigure(
    uuid: int,
    handles: list[str] | set[str],
    group: dist.ProcessGroup | None = None,
    timeout: timedelta | None = None,
    hints: dict[str, str] | None = None,
) -> dist.Work:
    """Go on with other members: fewer, more, or in another order.

    Collective among the new members, each of which calls it with the same uuid and
    handles. What is in flight in the group ends with an error. To reconfigure the
    default group is to reconfigure the mesh: all other groups whose ranks mean other
    workers then are refused until they are reconfigured too. The members of any other
    group must be members of the default one.

    Args:
        uuid: never used before for this group.
        handles: in the order of the new ranks; of a set, the oldest worker comes first.
        group: the default one if None.
        timeout: how long to wait for the other members; the group's if None.
        hints: for other backends.

    Raises:
        ConfigError: a handle is none, or of another job; this worker is not among them;
            the uuid was used; or the membership is that of a job that recovers itself.
        StaleEpoch: a handle is of an older epoch: exchange them again.
        PeerLost, CollectiveTimeout: a member does not come. The group is refused until
            it is reconfigured under another uuid.
    """
    group = _group(group)
    backend = _ours(group)
    opts = _C.ReconfigureOptions()
    opts.uuid = uuid
    opts.handles = handles
    opts.timeout = timeout
    opts.hints = hints or {}
    try:
        return backend.reconfigure(opts)
    finally:
        _tell_torch(group, backend)


def reseat(global_ranks: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
    """Go on with these ranks of the mesh's membership, without talking to anybody.

    For whoever moves the mesh by itself: all members of the group do it afterwards.
    """
    group = _group(group)
    backend = _ours(group)
    backend.reseat(list(global_ranks))
    _tell_torch(group, backend)


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return c10d._get_default_group() if group is None else group


def _backend_of(group: dist.ProcessGroup) -> Backend | None:
    try:
        return group._get_backend(torch.device("cpu"))
    except RuntimeError:  # it has none for the CPU
        return None


def _ours(group: dist.ProcessGroup) -> _C.MnemosyneBackend:
    backend = _backend_of(group)
    if not isinstance(backend, _C.MnemosyneBackend):
        raise ConfigError(f"group {group.group_name} is not of backend mnemosyne")
    return backend


def mesh_ranks_of_default_group() -> list[int] | None:
    """Return the mesh's rank for each global rank of c10d; None if it is not ours."""
    if not dist.is_initialized():
        return None
    backend = _backend_of(c10d._get_default_group())
    if not isinstance(backend, _C.MnemosyneBackend):
        return None
    return backend.global_ranks


def _tell_torch(group: dist.ProcessGroup, backend: _C.MnemosyneBackend) -> None:
    """Let torch's own records say what the backend says."""
    if hasattr(_C, "set_place"):
        _C.set_place(group, backend.rank(), backend.size())
    if group not in c10d._world.pg_group_ranks:  # not made by torch.distributed
        return
    ranks = backend.global_ranks
    if group is c10d._get_default_group():
        ranks = list(range(len(ranks)))
    elif (world := mesh_ranks_of_default_group()) is not None:
        ranks = [world.index(rank) for rank in ranks if rank in world]
    c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
