"""A checksum of tensors' bytes, made where they lie."""

import ctypes
import zlib
from collections.abc import Iterable, Sequence

import torch

_BLOCK_BYTES = 1 << 25  # what is taken of a device's memory besides: twice that
_WORD_BYTES = 8


def checksum(parts: Iterable[torch.Tensor]) -> int:
    """Return 32 bits that follow from the bytes of ``parts``, each ``[n]`` uint8.

    In host memory it is their CRC-32. On a device each block of words is summed up,
    each word times an odd number of its place, and the CRC-32 is that of the sums: any
    one word that differs makes another sum.
    """
    crc, sums = 0, list[torch.Tensor]()
    for part in parts:
        if part.is_cpu:
            crc = _crc(part, crc)
        else:
            sums += block_sums(part)
    return _crc(torch.stack(sums).cpu(), crc) if sums else crc


def block_sums(part: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the sums of the blocks of ``part``, ``[n]`` uint8, as int64 scalars."""
    sums = []
    for begin in range(0, len(part), _BLOCK_BYTES):
        block = part[begin : begin + _BLOCK_BYTES]
        if len(block) % _WORD_BYTES or block.data_ptr() % _WORD_BYTES:
            size = -(-len(block) // _WORD_BYTES) * _WORD_BYTES
            padded = torch.zeros(size, dtype=torch.uint8, device=part.device)
            padded[: len(block)].copy_(block)
            block = padded
        words = block.view(torch.int64)
        places = torch.arange(1, 2 * len(words), 2, device=part.device)
        sums.append((words * places).sum())
    return sums


def _crc(contents: torch.Tensor, crc: int) -> int:
    size = contents.numel() * contents.element_size()
    memory = (ctypes.c_char * size).from_address(contents.data_ptr())
    return zlib.crc32(memory, crc)
