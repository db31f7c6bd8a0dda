"""Runs a plan: replicas send their stripes straight into the newcomer's tensors.

Per newcomer: the first source sends a head (manifest and scalars); then every source
sends its stripes, and after them the manifest's digest and a checksum of its stripes.
What lies on devices goes from one to the other where there is a carrier, else by way
of host memory. Peers have proved that they belong to the job, so the head may be a
pickle.
"""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from mnemosyne_plugin.errors import StateMismatch
from mnemosyne_plugin.state.checksum import bytes_of, checksum
from mnemosyne_plugin.state.manifest import TrainingState, describe, digest
from mnemosyne_plugin.state.plan import plan


class Endpoint(Protocol):
    """The point-to-point half of a c10d backend; ranks are those of its group."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Any:
        """Start sending; the returned work has ``wait``."""

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any:
        """Start receiving; the returned work has ``wait``."""


class Carrier(Protocol):
    """Moves contents of devices between them; ranks are those of the job."""

    device_type: str

    def move(
        self,
        outgoing: Sequence[tuple[torch.Tensor, int]],
        incoming: Sequence[tuple[torch.Tensor, int]],
    ) -> None:
        """Send each tensor to a rank, receive others, and wait until it has happened.

        Between two ranks the order is the same on both sides. Raises what cut it short.
        """


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
    carrier: Carrier | None = None,
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
    views = [_bytes_of(tensor, carrier) for tensor in tensors.values()]
    parts = [
        views[stripe.index][stripe.begin : stripe.end]
        for stripe in plan([len(view) for view in views], sources)
        if stripe.source == rank
    ]
    outgoing = []
    for part in parts:
        if _is_carried(part, carrier):
            outgoing.append((part, newcomer))
        else:
            works.append(endpoint.send([part], newcomer, _STRIPE_TAG))
    if carrier is not None and outgoing:
        carrier.move(outgoing, [])
    seal = torch.tensor([digest(manifest), checksum(parts)], dtype=torch.int64)
    works.append(endpoint.send([seal], newcomer, _SEAL_TAG))
    for work in works:
        work.wait()
    return sum(len(part) for part in parts)


def receive_state(
    endpoint: Endpoint,
    state: TrainingState,
    *,
    sources: Sequence[int],
    carrier: Carrier | None = None,
) -> int:
    """Fill ``state`` from its replicas; returns the bytes received.

    All sources and the newcomer have a carrier, or none has. Raises StateMismatch where
    contents or structure differ from what was sent.
    """
    manifest, scalars = pickle.loads(
        IncomingBlob(endpoint, sources[0], _HEAD_TAG).wait()
    )
    tensors = state.allocate(manifest)
    if describe(tensors) != manifest:
        raise StateMismatch("newcomer holds its tensors in another order")
    views = {key: _bytes_of(tensor, carrier) for key, tensor in tensors.items()}
    flat = list(views.values())
    works, incoming = [], []
    parts: dict[int, list[torch.Tensor]] = {source: [] for source in sources}
    for stripe in plan([len(view) for view in flat], sources):
        part = flat[stripe.index][stripe.begin : stripe.end]
        parts[stripe.source].append(part)
        if _is_carried(part, carrier):
            incoming.append((part, stripe.source))
        else:
            works.append(endpoint.recv([part], stripe.source, _STRIPE_TAG))
    seals = {source: torch.zeros(2, dtype=torch.int64) for source in sources}
    works += [endpoint.recv([seals[s]], s, _SEAL_TAG) for s in sources]
    if carrier is not None and incoming:
        carrier.move([], incoming)
    for work in works:
        work.wait()
    for source, seal in seals.items():
        if seal.tolist() != [digest(manifest), checksum(parts[source])]:
            raise StateMismatch(f"contents from rank {source} fail their checksum")
    _write_back(tensors, views)
    state.load_scalars(scalars)
    return sum(len(view) for view in flat)


def _bytes_of(tensor: torch.Tensor, carrier: Carrier | None) -> torch.Tensor:
    """Return the contents as ``[size_bytes]`` uint8: in host memory, or to be carried.

    A view, if they are there and their order allows it.
    """
    contents = bytes_of(tensor)
    return contents if _is_carried(contents, carrier) else contents.cpu()


def _is_carried(contents: torch.Tensor, carrier: Carrier | None) -> bool:
    return carrier is not None and contents.device.type == carrier.device_type


def _write_back(
    tensors: Mapping[str, torch.Tensor], views: Mapping[str, torch.Tensor]
) -> None:
    for key, tensor in tensors.items():
        if views[key].numel() and views[key].data_ptr() != tensor.data_ptr():
            contents = views[key].view(tensor.dtype).reshape(tensor.shape)
            with torch.no_grad():
                tensor.copy_(contents)
