"""One version of a shard in host memory, and how it comes there."""

import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from mnemosyne_plugin.errors import StateMismatch
from mnemosyne_plugin.state.checksum import Checksum, bytes_of, checksum, crc_of
from mnemosyne_plugin.state.manifest import Entry, describe

Tensors = dict[str, torch.Tensor]

_ALIGNMENT = 64
_HEAD_BYTES = 1 << 14


class Shard(Protocol):
    """State that only this rank has; adapters implement it for their trainer."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live tensors.

        Between two mutations nothing changes them, but those under "buffer/".
        """

    def allocate(self, manifest: Sequence[Entry]) -> dict[str, torch.Tensor]:
        """Have just the tensors that ``manifest`` names, and return them.

        Raises StateMismatch where the trainer has built something else.
        """

    def scalars(self) -> dict[str, Any]:
        """Return the rest as it is between two steps. Picklable."""

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take what ``scalars`` returned."""

    def rebuild(self) -> None:
        """Make all that follows from the shards of all ranks, such as parameters.

        Collective over the trainer's groups: every rank has loaded its shard.
        """


@dataclass(frozen=True, slots=True)
class Image:
    """One version of one rank's shard: the tensors' bytes, then the pickled rest.

    The rest includes the rank's pack: its random state and data position.
    """

    version: int
    data: torch.Tensor
    """``[size_bytes]`` uint8, in host memory."""
    body_bytes: int
    head_crc: int
    body_checksum: int
    """As ``checksum`` of the tensors, where these lie."""

    @property
    def host_bytes(self) -> int:
        """What ``data`` takes of memory: torch pins powers of two."""
        size = len(self.data)
        return 1 << (size - 1).bit_length() if self.data.is_pinned() else size

    def header(self) -> torch.Tensor:
        """Return what ``of_header`` needs, ``[5]`` int64."""
        sums = self.head_crc, self.body_checksum
        return torch.tensor([self.version, len(self.data), self.body_bytes, *sums])

    @classmethod
    def of_header(cls, header: torch.Tensor, spare: torch.Tensor | None) -> "Image":
        """Return an image whose data are still to be received."""
        version, size, *rest = header.tolist()
        return cls(version, _buffer(size, spare, is_pinned=False), *rest)

    def load(self, shard: Shard) -> bytes:
        """Put the contents back into ``shard``, and return the pack.

        Raises StateMismatch if they are damaged.
        """
        head = self.data[self.body_bytes :]
        self._check(crc_of(head), self.head_crc)
        manifest, scalars, pack = pickle.loads(bytes(head.numpy()))
        tensors = shard.allocate(manifest)
        begins, _ = _places([entry.size_bytes for entry in manifest])
        with torch.no_grad():
            for entry, begin in zip(manifest, begins, strict=True):
                part = self.data[begin : begin + entry.size_bytes]
                tensor = tensors[entry.key]
                tensor.copy_(part.view(tensor.dtype).reshape(tensor.shape))
        loaded = {entry.key: tensors[entry.key] for entry in manifest}
        sums = (checksum(map(bytes_of, t.values())) for t in _parted(loaded))
        self._check(_joined(*sums), self.body_checksum)
        shard.load_scalars(scalars)
        return bytes(pack)

    def _check(self, got: int, wanted: int) -> None:
        if got != wanted:
            raise StateMismatch(
                f"the snapshot of version {self.version} fails its checksum",
                key="snapshot",
            )


class Copying:
    """An image in the making. What lies on a device comes while the job goes on."""

    def __init__(
        self, version: int, shard: Shard, pack: bytes, spare: torch.Tensor | None
    ) -> None:
        """Begin to copy ``shard`` as it is now, into ``spare`` if that fits.

        It must not be mutated before ``finish``.
        """
        self.version = version
        tensors = shard.tensors()
        head = pickle.dumps((describe(tensors), shard.scalars(), pack))
        # A head's size changes a little from step to step, the memory's must not.
        head += bytes(-len(head) % _HEAD_BYTES)
        sizes = [t.numel() * t.element_size() for t in tensors.values()]
        begins, self._body_bytes = _places(sizes)
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        is_pinned = device is not None
        self._data = _buffer(self._body_bytes + len(head), spare, is_pinned)
        rest = self._data[self._body_bytes :]
        rest.copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        parts = {
            key: self._data[begin : begin + size]
            for key, begin, size in zip(tensors, begins, sizes, strict=True)
        }
        still, moving = _parted(tensors)
        self._sums = Checksum(), Checksum()
        self._end: torch.cuda.Event | None = None
        _copy(moving, parts, self._sums[1])
        if device is None:
            _copy(still, parts, self._sums[0])
            return
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _copy(still, parts, self._sums[0])
        for tensor in still.values():
            if tensor.is_cuda:
                tensor.record_stream(stream)
        self._end = stream.record_event()

    @property
    def is_done(self) -> bool:
        """Whether ``finish`` would not wait."""
        if self._end is None:
            return True
        # A question while a graph is captured would break the capture.
        is_capturing = torch.cuda.is_current_stream_capturing()
        return not is_capturing and bool(self._end.query())  # type: ignore[no-untyped-call]

    def finish(self) -> Image:
        """Wait until all has been copied, and return it."""
        if self._end is not None:
            self._end.synchronize()
        head_crc = crc_of(self._data[self._body_bytes :])
        body = _joined(*(each.value() for each in self._sums))
        return Image(self.version, self._data, self._body_bytes, head_crc, body)


def _parted(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Part what only a mutation changes, and the rest."""
    moving = {key: each for key, each in tensors.items() if key.startswith("buffer/")}
    still = {key: each for key, each in tensors.items() if key not in moving}
    return still, moving


def _copy(tensors: Tensors, parts: Tensors, sums: Checksum) -> None:
    """Begin to, on the current stream."""
    for key, tensor in tensors.items():
        contents = bytes_of(tensor)
        parts[key].copy_(contents, non_blocking=tensor.is_cuda)
        sums.add(contents)
    sums.fetch(wait=False)


def _joined(*checksums: int) -> int:
    return crc_of(torch.tensor(checksums))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # Of the lowest priority.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where each tensor begins, and where the last one ends."""
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return begins, end


def _buffer(size: int, spare: torch.Tensor | None, is_pinned: bool) -> torch.Tensor:
    """Return ``spare`` if it fits: fresh memory costs a page fault per 4 KiB."""
    if spare is not None and len(spare) == size and is_pinned <= spare.is_pinned():
        return spare
    if is_pinned:
        # Pages that cannot be pinned are as good, only slower.
        with suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)
