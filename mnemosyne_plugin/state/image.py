"""One version of a shard in host memory, and how it comes there."""

import pickle
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from mnemosyne_plugin.errors import StateMismatch
from mnemosyne_plugin.state.checksum import BlockSums, checksum, crc_of
from mnemosyne_plugin.state.manifest import Entry, describe

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
        loaded = [tensors[entry.key] for entry in manifest]
        with torch.no_grad():
            for entry, tensor, begin in zip(manifest, loaded, begins, strict=True):
                part = self.data[begin : begin + entry.size_bytes]
                tensor.copy_(part.view(tensor.dtype).reshape(tensor.shape))
        self._check(checksum(_bytes_of(each) for each in loaded), self.body_checksum)
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
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        size = self._body_bytes + len(head)
        self._data = _buffer(size, spare, is_pinned=bool(devices))
        self._data[self._body_bytes :] = torch.frombuffer(
            bytearray(head), dtype=torch.uint8
        )
        self._host_parts: list[torch.Tensor] = []
        self._sums = {device: BlockSums(device) for device in devices}
        self._ends: list[torch.cuda.Event] = []
        for device in devices:
            _stream(device).wait_stream(torch.cuda.current_stream(device))
        for (key, tensor), begin, size in zip(
            tensors.items(), begins, sizes, strict=True
        ):
            self._copy(key, tensor, self._data[begin : begin + size])
        for device in devices:
            # What forward changes has been copied in front of it.
            _stream(device).wait_stream(torch.cuda.current_stream(device))
            self._ends.append(_stream(device).record_event())

    def _copy(self, key: str, tensor: torch.Tensor, part: torch.Tensor) -> None:
        if not tensor.is_cuda:
            part.copy_(_bytes_of(tensor))
            self._host_parts.append(part)
            return
        with ExitStack() as stack:
            if not key.startswith("buffer/"):
                stream = _stream(tensor.device)
                tensor.record_stream(stream)
                stack.enter_context(torch.cuda.stream(stream))
            contents = _bytes_of(tensor)
            part.copy_(contents, non_blocking=True)
            self._sums[tensor.device].add(contents)

    @property
    def is_done(self) -> bool:
        """Whether ``finish`` would not wait."""
        return all(end.query() for end in self._ends)  # type: ignore[no-untyped-call]

    def finish(self) -> Image:
        """Wait until all has been copied, and return it."""
        for end in self._ends:
            end.synchronize()
        return Image(
            self.version,
            self._data,
            self._body_bytes,
            crc_of(self._data[self._body_bytes :]),
            checksum(self._host_parts, self._sums.values()),
        )


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # Of the lowest priority.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contents as ``[size_bytes]`` uint8, in their order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


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
    return torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
