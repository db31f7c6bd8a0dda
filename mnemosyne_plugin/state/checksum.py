"""A checksum of tensors' bytes, made where they lie.

In host memory it is their CRC-32. On a device the words of each block are summed up,
each times an odd number of its place, and the CRC-32 is that of the sums: any one word
that differs makes another sum.
"""

import ctypes
import zlib
from collections.abc import Iterable

import torch

_BLOCK_BYTES = 1 << 23
_WORD_BYTES = 8


class BlockSums:
    """The sums of what lies on one device. Takes three blocks of its memory."""

    def __init__(self, device: torch.device) -> None:
        """Work on the stream that is the current one."""
        num_words = _BLOCK_BYTES // _WORD_BYTES
        self._factors = torch.arange(1, 2 * num_words, 2, device=device)
        self._sums: list[torch.Tensor] = []

    def add(self, part: torch.Tensor) -> None:
        """Start to sum up ``part``, ``[n]`` uint8, on the current stream."""
        for begin in range(0, len(part), _BLOCK_BYTES):
            words = _words_of(part[begin : begin + _BLOCK_BYTES])
            self._sums.append((words * self._factors[: len(words)]).sum())

    def crc(self, crc: int) -> int:
        """Wait for the sums, and return their CRC-32, behind another's."""
        return crc_of(torch.stack(self._sums).cpu(), crc) if self._sums else crc


def checksum(parts: Iterable[torch.Tensor], others: Iterable[BlockSums] = ()) -> int:
    """Return 32 bits that follow from the bytes of ``parts``, each ``[n]`` uint8.

    others: of more parts, which are on devices.
    """
    crc, sums = 0, dict[torch.device, BlockSums]()
    for part in parts:
        if part.is_cpu:
            crc = crc_of(part, crc)
            continue
        if part.device not in sums:
            sums[part.device] = BlockSums(part.device)
        sums[part.device].add(part)
    for each in (*sums.values(), *others):
        crc = each.crc(crc)
    return crc


def crc_of(contents: torch.Tensor, crc: int = 0) -> int:
    """Return the CRC-32 of a contiguous tensor in host memory, behind another's."""
    size = contents.numel() * contents.element_size()
    memory = (ctypes.c_char * size).from_address(contents.data_ptr())
    return zlib.crc32(memory, crc)


def _words_of(block: torch.Tensor) -> torch.Tensor:
    """Return its bytes as int64, filled up with zeros; a view, if that can be."""
    if len(block) % _WORD_BYTES or block.data_ptr() % _WORD_BYTES:
        size = -(-len(block) // _WORD_BYTES) * _WORD_BYTES
        whole = torch.zeros(size, dtype=torch.uint8, device=block.device)
        whole[: len(block)].copy_(block)
        block = whole
    return block.view(torch.int64)
