"""Local state of each rank (RNG, data position), kept by its buddies in host memory.

A *pack* is the pickled local state of one rank at one version (number of committed
steps). Each rank sends the pack of the next version to its buddies before it votes, and
votes only when it holds its wards' packs: so a committed step implies that every
rank's local state survives the rank. (A rank with a shard has its packs in the images
of the shard instead, and exchanges none.) A smaller pack travels at the begin of a
step, only if the script moved a generator between two steps.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mnemosyne_plugin.errors import RecoverableError, StateMismatch
from mnemosyne_plugin.state.transfer import Endpoint, IncomingBlob, send_blob

_AFTER_TAG, _BEGIN_TAG = 111, 112
_HEADER_BYTES = 16  # version and length, little-endian int64 each


class Mirrors:
    """This rank's packs, and those of its wards. Used by one thread at a time."""

    def __init__(self, buddies: Sequence[int], wards: Sequence[int]) -> None:
        self._buddies = buddies
        self._wards = wards
        self.num_kept = 2
        """Versions: the committed one, and the one that the vote in flight decides."""
        self._own: dict[int, bytes] = {}
        self._after: dict[int, dict[int, bytes]] = {ward: {} for ward in wards}
        self._begin: dict[int, dict[int, bytes]] = {ward: {} for ward in wards}
        self._own_begin = (0, b"")
        self._capacity = 0
        self._pending: dict[int, tuple[torch.Tensor, Any]] = {}
        self._sends: list[Any] = []

    @property
    def is_connected(self) -> bool:
        """Whether the ranks have agreed on a capacity."""
        return self._capacity > 0

    def connect(self, endpoint: Endpoint, standing: Endpoint, capacity: int) -> None:
        """Use these endpoints from now on. Every rank must pass the same ``capacity``.

        standing: for receives that may never be answered, so without a deadline.
        Called in every new epoch, because receives of the old one are cancelled.
        """
        self._endpoint = endpoint
        self._standing = standing
        self._capacity = capacity
        self._sends = []
        self._pending = {ward: self._receive_begin(ward) for ward in self._wards}
        if self._own_begin[1]:
            self.send_begin(*self._own_begin)

    def remember(self, version: int, pack: bytes) -> None:
        """Keep this rank's own pack, to be sent by ``exchange``."""
        self._own[version] = pack
        self._forget(self._own)

    def own(self, version: int) -> bytes | None:
        """Return this rank's own pack of ``version``, if it has one."""
        return self._own.get(version)

    def exchange(self, version: int) -> None:
        """Send the own pack of ``version`` and wait for those of all wards.

        A rank without such a pack (nothing is committed yet) sends an empty one.
        """
        content = version.to_bytes(8, "little") + self._own.get(version, b"")
        works = self._sends
        self._sends = []
        incoming = {
            ward: IncomingBlob(self._endpoint, ward, _AFTER_TAG) for ward in self._wards
        }
        for buddy in self._buddies:
            works += send_blob(self._endpoint, content, buddy, _AFTER_TAG)
        for ward, message in incoming.items():
            blob = message.wait()
            if blob[8:]:
                self._after[ward][int.from_bytes(blob[:8], "little")] = blob[8:]
                self._forget(self._after[ward])
        for work in works:
            work.wait()

    def send_begin(self, version: int, pack: bytes) -> None:
        """Start sending the pack of the begin of a step; nobody waits for it."""
        self._own_begin = (version, pack)
        self._sends = [work for work in self._sends if not work.is_completed()]
        self._sends += self._send_begin(version, pack)

    def collect(self) -> None:
        """Take in the begin packs that have arrived."""
        for ward in self._wards:
            while self._take_begin(ward):
                self._pending[ward] = self._receive_begin(ward)

    def collect_last(self) -> None:
        """As ``collect``, behind the end of an epoch: nothing more will arrive."""
        for ward in self._wards:
            self._take_begin(ward)
        self._pending = {}

    def _take_begin(self, ward: int) -> bool:
        if ward not in self._pending:
            return False
        buffer, work = self._pending[ward]
        if not work.is_completed():
            return False
        try:
            work.wait()
        except RecoverableError:
            return False  # cancelled; `connect` asks again
        self._keep_begin(ward, buffer)
        return True

    def held(self) -> dict[int, tuple[int, ...]]:
        """Return ward -> versions whose pack this rank holds."""
        return {ward: tuple(packs) for ward, packs in self._after.items()}

    def packs_of(self, ward: int, version: int) -> tuple[bytes, bytes]:
        """Return a ward's packs after the last and at the begin of the next step."""
        after, begin = self._after[ward], self._begin[ward]
        return after.get(version, b""), begin.get(version, b"")

    def _send_begin(self, version: int, pack: bytes) -> list[Any]:
        if len(pack) > self._capacity - _HEADER_BYTES:
            raise StateMismatch(
                f"random state grew to {len(pack)} bytes, its buddies expect at most "
                f"{self._capacity - _HEADER_BYTES}",
                key="local",
            )
        header = version.to_bytes(8, "little") + len(pack).to_bytes(8, "little")
        buffer = torch.zeros(self._capacity, dtype=torch.uint8)
        content = torch.frombuffer(bytearray(header + pack), dtype=torch.uint8)
        buffer[: len(content)] = content
        return [self._standing.send([buffer], to, _BEGIN_TAG) for to in self._buddies]

    def _receive_begin(self, ward: int) -> tuple[torch.Tensor, Any]:
        buffer = torch.empty(self._capacity, dtype=torch.uint8)
        return buffer, self._standing.recv([buffer], ward, _BEGIN_TAG)

    def _keep_begin(self, ward: int, buffer: torch.Tensor) -> None:
        content = bytes(buffer.numpy())
        version = int.from_bytes(content[:8], "little")
        length = int.from_bytes(content[8:_HEADER_BYTES], "little")
        self._begin[ward][version] = content[_HEADER_BYTES : _HEADER_BYTES + length]
        self._forget(self._begin[ward])

    def _forget(self, packs: dict[int, bytes]) -> None:
        for version in sorted(packs)[: -self.num_kept]:
            del packs[version]


def capacity_for(largest_pack_bytes: int) -> int:
    """Return the message size that all ranks use: room to grow to twice the size."""
    return _HEADER_BYTES + 4096 * (-(-2 * largest_pack_bytes // 4096))
