"""A checksum of tensors' bytes, made where they lie.

In host memory it is their CRC-32. On a device the words of each block are summed up,
each times an odd number of its place, and the CRC-32 is that of the sums: one word that
differs makes another sum, and so do two that change places.
"""

import ctypes
import zlib
from collections.abc import Iterable

import torch

# A word, or the difference of two, times a factor or the difference of two is not a
# multiple of 2^64: no changed word is missed, and no exchange of two.
_BLOCK_BYTES = 1 << 23
_WORD_BYTES = 4


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contents as ``[size_bytes]`` uint8; a view, if the order allows it."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def checksum(parts: Iterable[torch.Tensor]) -> int:
    """Return that of ``parts``, each ``[n]`` uint8, in 32 bits."""
    whole = Checksum()
    for part in parts:
        whole.add(part)
    whole.fetch(wait=True)
    return whole.value()


def crc_of(contents: torch.Tensor, crc: int = 0) -> int:
    """Return the CRC-32 of a contiguous tensor in host memory, behind another's."""
    size = contents.numel() * contents.element_size()
    memory = (ctypes.c_char * size).from_address(contents.data_ptr())
    return zlib.crc32(memory, crc)


class Checksum:
    """One in the making. What lies on a device, on one, is summed up there.

    It works on the current stream, and takes five blocks of the device's memory.
    """

    def __init__(self) -> None:
        self._crc = 0
        self._block: list[torch.Tensor] = []
        self._block_bytes = 0
        self._sums: list[torch.Tensor] = []

    def add(self, part: torch.Tensor) -> None:
        """Take ``part``, ``[n]`` uint8, behind the others."""
        if part.is_cpu:
            self._crc = crc_of(part, self._crc)
            return
        for begin in range(0, len(part), _BLOCK_BYTES):
            block = part[begin : begin + _BLOCK_BYTES]
            if self._block_bytes + len(block) > _BLOCK_BYTES:
                self._flush()
            # Small parts make a block together: launches are what they would cost.
            self._block.append(block)
            self._block_bytes += len(block)

    def _flush(self) -> None:
        """Start to sum up what was added."""
        if not self._block:
            return
        block, device = self._block[0], self._block[0].device
        padding = -self._block_bytes % _WORD_BYTES
        if padding or len(self._block) > 1 or block.data_ptr() % _WORD_BYTES:
            zeros = torch.zeros(padding, dtype=torch.uint8, device=device)
            block = torch.cat([*self._block, zeros])
        words = block.view(torch.int32)
        if not self._sums:
            last = 2 * (_BLOCK_BYTES // _WORD_BYTES)
            self._factors = torch.arange(1, last, 2, device=device)
        self._sums.append((words * self._factors[: len(words)]).sum())
        self._block, self._block_bytes = [], 0

    def fetch(self, *, wait: bool) -> None:
        """Bring into host memory what ``value`` needs: nothing more is added.

        Without ``wait`` it is there once the current stream has come so far.
        """
        self._flush()
        if self._sums:
            self._fetched = torch.stack(self._sums).to("cpu", non_blocking=not wait)

    def value(self) -> int:
        """Return it, behind ``fetch``."""
        return crc_of(self._fetched, self._crc) if self._sums else self._crc
