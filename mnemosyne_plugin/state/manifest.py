"""What a rank owns: the interface to a trainer's state, and its description."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its key, shape, dtype (the name of a torch dtype) and device type."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"

    @property
    def size_bytes(self) -> int:
        """Size of the contents, without padding."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * torch_dtype(self.dtype).itemsize


class TrainingState(Protocol):
    """The replicated state of one rank; adapters implement it for their trainer."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live tensors, in the same order on every rank."""

    def allocate(self, manifest: Sequence[Entry]) -> dict[str, torch.Tensor]:
        """On a newcomer: make the tensors that ``manifest`` asks for, and return them.

        Raises StateMismatch where the script built something else than its replicas.
        """

    def rewind(self) -> None:
        """Within a step: undo what its forward has changed in the tensors."""

    def local(self) -> Any:
        """Return what forward changes and no replica has, as of now. Picklable."""

    def load_local(self, local: Any) -> None:
        """On a newcomer: take what ``local`` of the lost worker returned."""

    def scalars(self) -> dict[str, Any]:
        """Return the rest: counters, learning rates, schedulers. Picklable."""

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """On a newcomer: take what ``scalars`` of a replica returned."""


def describe(tensors: Mapping[str, torch.Tensor]) -> tuple[Entry, ...]:
    """Return the manifest of ``tensors``, in their order."""
    return tuple(
        Entry(
            key,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            tensor.device.type,
        )
        for key, tensor in tensors.items()
    )


def digest(manifest: Sequence[Entry]) -> int:
    """Return 63 bits that differ between different manifests."""
    text = repr([(each.key, each.shape, each.dtype, each.device) for each in manifest])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype with this name, as in ``Entry.dtype``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a torch dtype: {name!r}")
    return dtype
