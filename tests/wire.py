"""Endpoints of ranks in one process, made of queues."""

import queue
import threading
from typing import Any

import torch

from mnemosyne_plugin.errors import StaleEpoch


class Wire:
    """Messages between ranks; ``corrupt`` flips a bit of those with that tag."""

    def __init__(self, corrupt: int | None = None) -> None:
        self.corrupt = corrupt
        self.is_cut = False
        self.receives: list[tuple[int, int, int]] = []
        """(source, destination, tag) of each receive that was ever posted."""
        self._queues: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def queue(self, source: int, dst: int, tag: int) -> "queue.Queue[torch.Tensor]":
        with self._lock:
            return self._queues.setdefault((source, dst, tag), queue.Queue())

    def num_waiting(self, source: int, dst: int, tag: int) -> int:
        """Return how many messages nobody has taken yet."""
        return self.queue(source, dst, tag).qsize()

    def lose(self, source: int, dst: int, tag: int) -> None:
        """Take a message away, as if its sender had died in it."""
        self.queue(source, dst, tag).get_nowait()

    def cut(self) -> None:
        """End the epoch: what has not been received never will be."""
        self.is_cut = True


class Receive:
    def __init__(self, wire: Wire, key: tuple[int, int, int], tensor: torch.Tensor):
        self._wire, self._source = wire, wire.queue(*key)
        self._tensor, self._done = tensor, False
        wire.receives.append(key)

    def wait(self) -> None:
        if self._done:
            return
        if self._wire.is_cut and self._source.empty():
            raise StaleEpoch("the wire is cut")
        message = self._source.get(timeout=10)
        assert message.shape == self._tensor.shape
        self._tensor.copy_(message)
        self._done = True

    def is_completed(self) -> bool:
        """Also true of one that was cancelled, as torch has it."""
        if not self._done and not self._source.empty():
            self.wait()
        return self._done or self._wire.is_cut


class Done:
    def wait(self) -> None:
        pass


class Port:
    """One rank's end of the wire."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire, self._rank = wire, rank

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Any:
        copy = tensors[0].clone()
        if self._wire.corrupt == tag:
            copy[0] ^= 1
        self._wire.queue(self._rank, dst, tag).put(copy)
        return Done()

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any:
        return Receive(self._wire, (src, self._rank, tag), tensors[0])
