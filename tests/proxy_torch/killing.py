"""Servers that end, or hang, at random operations."""

import os
import random

from mnemosyne_plugin import proxy


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
        device.recover = self.recover  # type: ignore[method-assign]
        device.kill()

    def recover(self, timeout_s: float) -> None:
        """Start a server that will die, unless it is over."""
        at = self._draw.randrange(self._within)
        fault = f"fault={self._fault},{at=},server={self._device.generation + 1}"
        os.environ["MNEMOSYNE_EMULATED"] = "" if self._is_over else fault
        self._recover(timeout_s)

    def end(self) -> None:
        """Let the next server live."""
        self._is_over = True
        self._device.kill()
