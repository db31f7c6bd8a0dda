"""Servers that end, or hang, at random operations; on a GPU at random times."""

import os
import random
import threading

from mnemosyne_plugin import proxy

_LONGEST_S = 2.0


class Killing:
    """Has servers of this process die early."""

    def __init__(self, seed: int, within: int, fault: str) -> None:
        device = proxy.loaded()
        assert device is not None
        self._device, self._within = device, within
        self._draw = random.Random(seed)
        self._fault = fault
        self._recover = device.recover
        self._is_over = False
        self._timer: threading.Timer | None = None
        device.recover = self.recover  # type: ignore[method-assign]
        device.kill()

    def recover(self, timeout_s: float) -> None:
        """Start a server that will die, unless it is over."""
        at = self._draw.randrange(self._within)
        fault = f"fault={self._fault},{at=},server={self._device.generation + 1}"
        os.environ["MNEMOSYNE_EMULATED"] = "" if self._is_over else fault
        self._recover(timeout_s)
        is_emulated = os.environ.get("MNEMOSYNE_PROXY_DEVICE") == "emulated"
        if not is_emulated and not self._is_over:
            self._timer = threading.Timer(
                self._draw.uniform(0, _LONGEST_S), self._device.kill
            )
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """Let the next server live."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._device.kill()
