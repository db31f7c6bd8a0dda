"""A rank's device behind the proxy: its loss is seen, and mended, as a link's is.

A lost device costs no worker. The rank stays, with what is in its host memory, and
gets the rest as a newcomer does.
"""

import threading
import time
from pathlib import Path

import torch

from mnemosyne_plugin import ccl
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.proxy import DeviceProxy

_START_TIMEOUT_S = 120.0
_LAST_NCCL_RESULT = 8
_NUM_NAMED = 8
_GRACE_S = 10.0  # for what waited for other ranks to end, once it is aborted


class Device:
    """The device of one rank. The main thread's, but ``watch`` and ``release``."""

    def __init__(
        self, proxy: DeviceProxy, mesh: ccl.Mesh, rank: int, events: EventLog
    ) -> None:
        self.proxy = proxy
        self._mesh = mesh
        self._rank = rank
        self._events = events
        self._latched_at: float | None = None
        self._news: str | None = None
        self._looking = threading.Lock()
        self.has_bad_communicator = False
        """Whether NCCL has told of one; torch, which asks no more, knows of none."""
        self.is_empty = False
        """Whether its memory holds nothing of the training state."""
        # The proxy has no cuDNN, whose attention torch takes first on Hopper.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def is_in_use(self) -> bool:
        """Whether torch has begun to use it."""
        return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    def describe(self) -> str:
        """Return a line for the start: what is on, and what will not work."""
        missing = self.proxy.unsupported_imports(Path(torch.__file__).parent / "lib")
        names = ", ".join(missing[:_NUM_NAMED]) + (
            ", ..." if missing[_NUM_NAMED:] else ""
        )
        name = torch.cuda.get_device_name() if self.is_in_use else "not in use yet"
        return (
            f"device proxy on ({name}, server {self.proxy.server_pid}); torch imports "
            f"{len(missing)} functions that it does not support: {names}"
        )

    def look(self) -> None:
        """Fence the mesh if the device is lost, or a communicator has failed."""
        with self._looking:
            if self._mesh.failure() is not None:
                return
            error = 0 if self.proxy.is_lost else self.proxy.communicator_error()
            if self.proxy.is_lost or error > _LAST_NCCL_RESULT:  # then it is CUDA's
                self._news = self.proxy.describe_loss()
                self._mesh.fence(f"rank {self._rank} lost its device: {self._news}")
            elif error != 0:
                self.has_bad_communicator = True
                self._mesh.fence(f"rank {self._rank}: NCCL error {error}")

    def wait(self) -> None:
        """Wait for all that it was given, then ``look``."""
        if self.is_in_use:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                if not self.proxy.is_lost:
                    raise
        self.look()

    def recover(self) -> bool:
        """Start it again if it is lost; return whether it was. Raises FatalError."""
        if not self.proxy.is_lost:
            # What it was given before may still write to what is restored next.
            self.wait()
        if not self.proxy.is_lost:
            return False
        begun, loss = time.monotonic(), self.proxy.describe_loss()
        self.proxy.recover(_START_TIMEOUT_S)
        self.is_empty = True
        self._events.emit(
            "device_recovered",
            epoch=self._mesh.epoch,
            rank=self._rank,
            reason=loss,
            seconds=time.monotonic() - begun,
        )
        return True

    # --- the reader's thread ------------------------------------------------------

    def take_news(self) -> str | None:
        """Return how the device was lost, if that is new."""
        news, self._news = self._news, None
        return news

    def release(self) -> None:
        """A failure is latched: no communicator is made any more."""
        self.proxy.refuse_communicators()

    def watch(self, is_latched: bool) -> float:
        """See to it that no wait for the device is endless; return when to look again.

        is_latched: a failure is, so what still waits can only wait for the device.
        """
        now, waited = time.monotonic(), self.proxy.waiting_s
        limit = self.proxy.timeout_s
        if not is_latched:
            self._latched_at = None
        else:
            # A device takes longer to start than to be aborted.
            is_starting = self.proxy.state == "restoring"
            limit = _START_TIMEOUT_S if is_starting else min(limit, _GRACE_S)
            self._latched_at = self._latched_at or now
            waited = min(waited, now - self._latched_at)
        if waited < limit:
            return limit - waited
        if is_latched:
            self._latched_at = now
            self._events.emit("device_hangs", rank=self._rank, seconds=waited)
            self.proxy.kill()
        else:
            self._mesh.fence(
                f"rank {self._rank} has waited {waited:.0f} s for its device"
            )
        return limit
