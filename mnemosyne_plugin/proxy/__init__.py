"""The device proxy: a process between torch and the GPU. See docs/proxy.md.

``preload`` is what the launcher puts into the environment; ``loaded`` is what the
recovery runtime asks, in a worker that runs with it.
"""

import ctypes
import functools
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnemosyne_plugin.errors import ConfigError, FatalError
from mnemosyne_plugin.proxy import elf

_FOLDER = Path(__file__).parent / "lib"
_CLIENT = ("libmnemosyne_client.so", "libcuda.so.1")
_NUM_ATTEMPTS = 3  # a server may be lost before it has all memory
_TIMEOUT = "MNEMOSYNE_DEVICE_TIMEOUT_S"
TIMEOUT_S = 600.0
"""The longest wait for a device; NCCL's watchdog waits as long by default."""
_STATES = ("off", "healthy", "lost", "restoring", "failed", "child")


def preload(
    environment: Mapping[str, str], timeout_s: float | None = None
) -> dict[str, str]:
    """Return what to add to ``environment`` so that a python there runs with the proxy.

    timeout_s: the longest wait for the device; None: as the script says. Raises
    ConfigError if this installation has no proxy.
    """
    paths = [str(_FOLDER / name) for name in _CLIENT]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise ConfigError(
            f"the device proxy was not built: there is no {missing[0]}; install "
            "mnemosyne-plugin again"
        )
    others = environment.get("LD_PRELOAD", "").split(":")
    preload = {"LD_PRELOAD": ":".join([*paths, *filter(None, others)])}
    return preload if timeout_s is None else {**preload, _TIMEOUT: str(timeout_s)}


def unloaded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` such that a python there runs without the proxy."""
    names = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    others = [name for name in names if os.path.basename(name) not in _CLIENT]
    return {**environment, "LD_PRELOAD": ":".join(others)}


def installed() -> "DeviceProxy":
    """Return the client as a library like any other: for what no device is asked.

    Raises ConfigError if this installation has none.
    """
    return DeviceProxy(ctypes.CDLL(preload({})["LD_PRELOAD"].partition(":")[0]))


@functools.cache
def loaded() -> "DeviceProxy | None":
    """Return the proxy of this process; None if it was started without one."""
    process = ctypes.CDLL(None)
    return DeviceProxy(process) if hasattr(process, "mnemosyne_proxy_state") else None


class DeviceProxy:
    """The client's part, which is loaded into this process. Any thread may call it."""

    def __init__(self, library: Any) -> None:
        """library: has the C functions of csrc/proxy/client_api.cc."""
        self._c = library
        self._c.mnemosyne_proxy_waiting_seconds.restype = ctypes.c_double
        self._c.mnemosyne_proxy_generation.restype = ctypes.c_uint64
        self._c.mnemosyne_proxy_take_trace.restype = ctypes.c_uint64
        self.timeout_s = float(os.environ.get(_TIMEOUT, TIMEOUT_S))
        """The longest wait for the device that is not given up."""

    def propose_timeout(self, timeout_s: float) -> None:
        """Take this as ``timeout_s``, unless the launcher was given one."""
        if _TIMEOUT not in os.environ:
            self.timeout_s = timeout_s

    @property
    def state(self) -> str:
        """What the client says: off, healthy, lost, restoring, failed or child."""
        return _STATES[self._c.mnemosyne_proxy_state()]

    @property
    def is_lost(self) -> bool:
        """Whether the device's memory is gone and nobody has recovered it."""
        return self.state in ("lost", "failed")

    @property
    def server_pid(self) -> int:
        """The process that owns the device; 0 if there is none."""
        return int(self._c.mnemosyne_proxy_server_pid())

    @property
    def generation(self) -> int:
        """How many servers there were."""
        return int(self._c.mnemosyne_proxy_generation())

    @property
    def waiting_s(self) -> float:
        """For how long some thread has been waiting for the device."""
        return float(self._c.mnemosyne_proxy_waiting_seconds())

    @property
    def lost_fd(self) -> int:
        """An eventfd that becomes readable when the device is lost."""
        return int(self._c.mnemosyne_proxy_lost_fd())

    def acknowledge(self) -> None:
        """Empty ``lost_fd``."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.lost_fd)

    def describe_loss(self) -> str:
        """Return in words what happened to the device."""
        text = ctypes.create_string_buffer(1024)
        self._c.mnemosyne_proxy_message(text, len(text))
        said = text.value.decode(errors="replace")
        error = self._c.mnemosyne_proxy_error()
        return said or f"its server ended, CUDA error {error}"

    def counts(self) -> dict[str, int]:
        """Return commands sent, round trips, bytes, and calls that were refused."""
        counts = (ctypes.c_uint64 * 4)()
        self._c.mnemosyne_proxy_counts(counts)
        return dict(zip(("commands", "calls", "bytes", "refused"), counts, strict=True))

    def unsupported_imports(self, folder: Path) -> list[str]:
        """Return what the libraries in torch's ``folder`` import and would not get."""
        get = self._c.mnemosyne_proxy_unsupported
        get.restype = ctypes.c_char_p
        unsupported = set(get().decode().split())
        libraries = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so")
        paths = [folder / name for name in libraries]
        names = (elf.dynamic_names(path) for path in paths if path.exists())
        return sorted(unsupported.intersection(set().union(*names)))

    def take_trace(self) -> int:
        """Return a number that tells the commands since its last call from others.

        The first call has them counted from there on.
        """
        return int(self._c.mnemosyne_proxy_take_trace())

    def recover(self, timeout_s: float) -> None:
        """Start a new server, with all memory at its old addresses, full of NaN.

        Raises FatalError if the device does not come back.
        """
        for _ in range(_NUM_ATTEMPTS):
            if self._c.mnemosyne_proxy_recover(int(timeout_s * 1000)) == 0:
                return
            if self.state != "lost":
                break
        raise FatalError(f"the device does not come back: {self.describe_loss()}")

    def count_devices(self) -> int:
        """Return how many there are; leaves no server and no thread that was not."""
        count = ctypes.c_int(0)
        self._c.cudaGetDeviceCount(ctypes.byref(count))
        self._c.mnemosyne_proxy_rest()
        return count.value

    def kill(self) -> None:
        """End the server: the way out of a device that hangs."""
        self._c.mnemosyne_proxy_kill()

    # --- communicators of NCCL ----------------------------------------------------

    def refuse_communicators(self) -> None:
        """Have none made until ``admit_communicators``: this epoch is over.

        A thread that is making one gets an error.
        """
        self._c.mnemosyne_proxy_refuse_comms()

    def admit_communicators(self) -> None:
        """Let communicators be made: an epoch has begun, in which all ranks do."""
        self._c.mnemosyne_proxy_admit_comms()

    def communicator_error(self) -> int:
        """Return the ncclResult_t of a communicator that has failed, or 0."""
        return int(self._c.mnemosyne_proxy_comm_error())
