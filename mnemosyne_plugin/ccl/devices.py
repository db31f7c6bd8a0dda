"""What moves the tensors of a group that lie on devices: a backend of torch's own.

Ours is the life around it. docs/design.md, "Groups on devices".
"""

import importlib
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend, Store
from torch.distributed import distributed_c10d as c10d

from mnemosyne_plugin.ccl import _C
from mnemosyne_plugin.errors import ConfigError

DeviceGroup = _C.DeviceBackend

_VARIABLE = "MNEMOSYNE_DEVICE_GROUPS"
# A watchdog that ends the process, aborts by itself, or asks a store for others,
# knows nothing of recovery. Who is lost is seen by the mesh, and what only NCCL sees
# by ``look``. torchrun sets the first one, so that these cannot be the user's.
_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
    # Behind a timeout the watchdog sleeps for this, and its end waits for it.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
# In seconds: how far apart ranks may come to a communicator that is being made. torch's
# abort of one waits for it, too.
_CONNECT = "TORCH_NCCL_NONBLOCKING_TIMEOUT"
_CONNECT_S = "120"


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of one type, and how to make a backend for them."""

    type: str
    """As ``torch.device(...).type``."""
    make: Callable[[Store, int, int, timedelta, Any], Backend]
    """Of store, rank, size, timeout, and the options that the script gave."""
    connect_s: float = 10.0
    """The longest that one may wait for its members while it connects."""

    def current(self) -> torch.device:
        """Return the one that this thread uses."""
        if self.type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.type)

    def connect(self, group: DeviceGroup, device: torch.device, once: bool) -> Any:
        """Make the group's backend. Collective; any thread.

        once: have its members communicate, which NCCL connects them for. Returns the
        work, for the caller to wait for once all groups have come so far: ranks have
        theirs communicate in any order.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with the first
        return group.connect([torch.zeros(1, device=device)] if once else [])

    def used(self) -> torch.device | None:
        """Return the one that this thread uses, if this process uses any."""
        if self.type == "cuda" and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        return self.current()

    def wait(self, device: torch.device | None = None) -> None:
        """Wait for all that this process has given to ``device``, or this thread's."""
        if self.type != "cuda" or self.used() is None:
            return
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins with the first
        torch.cuda.synchronize()


def are_named(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether MNEMOSYNE_DEVICE_GROUPS says what moves tensors on devices."""
    return bool(environment.get(_VARIABLE))


def find_devices(
    has_proxy: bool, environment: MutableMapping[str, str] = os.environ
) -> Devices | None:
    """Return the devices whose tensors our groups are to move; None if there are none.

    MNEMOSYNE_DEVICE_GROUPS is "nccl", or module:function, which returns others. Under
    the device proxy it need not be given. Raises ConfigError if this torch has no NCCL.
    """
    named = environment.get(_VARIABLE, "")
    if has_proxy and not named and dist.is_nccl_available():
        return _nvidia(environment)
    if named == "nccl":
        if not dist.is_nccl_available():
            raise ConfigError(f"{named}: this torch has no NCCL")
        if not torch.cuda.is_available():
            try:  # it tells why
                torch.cuda.init()  # type: ignore[no-untyped-call]
            except (RuntimeError, AssertionError) as error:
                raise ConfigError(f"{named}: {error}") from error
        return _nvidia(environment)
    if not named:
        return None
    module, _, function = named.partition(":")
    found: Devices = getattr(importlib.import_module(module), function)()
    return found


def _nvidia(environment: MutableMapping[str, str]) -> Devices:
    environment.update(_SETTINGS)
    connect_s = environment.setdefault(_CONNECT, _CONNECT_S)
    if not connect_s.isdecimal() or int(connect_s) == 0:
        raise ConfigError(f"{_CONNECT} is {connect_s!r}, not a number of seconds")
    return Devices("cuda", _make_nccl, float(connect_s))


def device_groups() -> list[DeviceGroup]:
    """Return those of this process's groups that have devices, oldest first."""
    cpu = torch.device("cpu")
    groups = [g for g in list(c10d._world.pg_map) if cpu in g._device_types]
    backends = [group._get_backend(cpu) for group in groups]
    return [backend for backend in backends if isinstance(backend, DeviceGroup)]


def _make_nccl(
    store: Store, rank: int, size: int, timeout: timedelta, options: Any
) -> Backend:
    if not isinstance(options, dist.ProcessGroupNCCL.Options):
        options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
