"""Runs a plan: replicas send their stripes straight into the newcomer's tensors.

Per newcomer: the first source sends a head (manifest and scalars); then every source
sends its stripes, and after them the manifest's digest and a CRC-32 of its stripes.
Peers have proved that they belong to the job, so the head may be a pickle.
"""

import ctypes
import pickle
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from mnemosyne_plugin.errors import StateMismatch
from mnemosyne_plugin.state.manifest import TrainingState, describe, digest
from mnemosyne_plugin.state.plan import Stripe, plan


class Endpoint(Protocol):
    """The point-to-point half of a c10d backend; ranks are those of its group."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Any:
        """Start sending; the returned work has ``wait``."""

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any:
        """Start receiving; the returned work has ``wait``."""


_HEAD_TAG, _STRIPE_TAG, _SEAL_TAG = 101, 102, 103
# Of a blob: one message is enough for a rank's random state, which has 12 kB.
_FIRST_BYTES = 1 << 14
_LENGTH_BYTES = 8


def send_blob(endpoint: Endpoint, blob: bytes, dst: int, tag: int) -> list[Any]:
    """Start sending ``blob``; returns the works to wait for."""
    first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
    content = len(blob).to_bytes(_LENGTH_BYTES, "little") + blob
    payload = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    first[: len(payload)] = payload[:_FIRST_BYTES]
    works = [endpoint.send([first], dst, tag)]
    if len(payload) > _FIRST_BYTES:
        works.append(endpoint.send([payload[_FIRST_BYTES:]], dst, tag))
    return works


class IncomingBlob:
    """What ``send_blob`` of another rank sends: expected from now on."""

    def __init__(self, endpoint: Endpoint, src: int, tag: int) -> None:
        self._endpoint, self._src, self._tag = endpoint, src, tag
        self._first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        self._work = endpoint.recv([self._first], src, tag)

    def wait(self) -> bytes:
        """Return the blob as soon as it is here."""
        self._work.wait()
        first = bytes(self._first.numpy())
        end = _LENGTH_BYTES + int.from_bytes(first[:_LENGTH_BYTES], "little")
        if end <= _FIRST_BYTES:
            return first[_LENGTH_BYTES:end]
        rest = torch.empty(end - _FIRST_BYTES, dtype=torch.uint8)
        self._endpoint.recv([rest], self._src, self._tag).wait()
        return first[_LENGTH_BYTES:] + bytes(rest.numpy())


def send_state(
    endpoint: Endpoint,
    state: TrainingState,
    *,
    rank: int,
    sources: Sequence[int],
    newcomer: int,
) -> int:
    """Send this source's share to ``newcomer``; returns the bytes sent.

    Returns when the contents have left the tensors, which may then change.
    """
    tensors = state.tensors()
    manifest = describe(tensors)
    works: list[Any] = []
    if rank == sources[0]:
        head = pickle.dumps((manifest, state.scalars()))
        works += send_blob(endpoint, head, newcomer, _HEAD_TAG)
    views = [_bytes_of(tensor) for tensor in tensors.values()]
    mine = [s for s in plan([len(v) for v in views], sources) if s.source == rank]
    for stripe in mine:
        part = views[stripe.index][stripe.begin : stripe.end]
        works.append(endpoint.send([part], newcomer, _STRIPE_TAG))
    seal = torch.tensor([digest(manifest), _checksum(views, mine)], dtype=torch.int64)
    works.append(endpoint.send([seal], newcomer, _SEAL_TAG))
    for work in works:
        work.wait()
    return sum(stripe.end - stripe.begin for stripe in mine)


def receive_state(
    endpoint: Endpoint, state: TrainingState, *, sources: Sequence[int]
) -> int:
    """Fill ``state`` from its replicas; returns the bytes received.

    Raises StateMismatch where contents or structure differ from what was sent.
    """
    manifest, scalars = pickle.loads(
        IncomingBlob(endpoint, sources[0], _HEAD_TAG).wait()
    )
    tensors = state.allocate(manifest)
    if describe(tensors) != manifest:
        raise StateMismatch("newcomer holds its tensors in another order")
    views = {key: _bytes_of(tensor) for key, tensor in tensors.items()}
    flat = list(views.values())
    stripes = plan([len(view) for view in flat], sources)
    works = [
        endpoint.recv([flat[s.index][s.begin : s.end]], s.source, _STRIPE_TAG)
        for s in stripes
    ]
    seals = {source: torch.zeros(2, dtype=torch.int64) for source in sources}
    works += [endpoint.recv([seals[s]], s, _SEAL_TAG) for s in sources]
    for work in works:
        work.wait()
    for source, seal in seals.items():
        theirs = [stripe for stripe in stripes if stripe.source == source]
        if seal.tolist() != [digest(manifest), _checksum(flat, theirs)]:
            raise StateMismatch(f"contents from rank {source} fail their checksum")
    _write_back(tensors, views)
    state.load_scalars(scalars)
    return sum(len(view) for view in flat)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contents as ``[size_bytes]`` uint8 in host memory.

    A view, if they are there and their order allows it.
    """
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()


def _write_back(
    tensors: Mapping[str, torch.Tensor], views: Mapping[str, torch.Tensor]
) -> None:
    for key, tensor in tensors.items():
        if views[key].numel() and views[key].data_ptr() != tensor.data_ptr():
            contents = views[key].view(tensor.dtype).reshape(tensor.shape)
            with torch.no_grad():
                tensor.copy_(contents)


def _checksum(views: Sequence[torch.Tensor], stripes: Sequence[Stripe]) -> int:
    crc = 0
    for stripe in stripes:
        part = views[stripe.index][stripe.begin : stripe.end]
        memory = (ctypes.c_char * len(part)).from_address(part.data_ptr())
        crc = zlib.crc32(memory, crc)
    return crc
