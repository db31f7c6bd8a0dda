"""Who sends which bytes to a newcomer. Pure: no I/O, no torch, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stripe:
    """Bytes ``[begin, end)`` of entry number ``index``, sent by ``source``."""

    source: int
    index: int
    begin: int
    end: int


_ALIGNMENT = 64  # so that a stripe never splits an element


def plan(sizes_bytes: Sequence[int], sources: Sequence[int]) -> tuple[Stripe, ...]:
    """Split all entries evenly by bytes over the sources, in order.

    Every byte is in exactly one stripe; the shares differ by at most 64 bytes per
    cut. The result depends on the arguments only, so all ranks compute the same.
    """
    if not sources:
        raise ValueError("a plan needs at least one source")
    total = sum(sizes_bytes)
    share = -(-total // len(sources))
    stripes: list[Stripe] = []
    position = 0
    for index, size in enumerate(sizes_bytes):
        begin = 0
        while begin < size:
            seat = min((position + begin) // max(share, 1), len(sources) - 1)
            cut = (seat + 1) * share - position
            end = size if seat == len(sources) - 1 else min(size, _align(cut))
            stripes.append(Stripe(sources[seat], index, begin, end))
            begin = end
        position += size
    return tuple(stripes)


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
