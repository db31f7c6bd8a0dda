"""What a step needs or has made on a device, kept where the device cannot lose it.

Training state comes back from replicas; a batch and a loss have none.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

_LARGEST_RESULT = 1 << 16  # elements; a loss has one


class Inputs:
    """Copies of the device tensors that a step is called with."""

    def __init__(self, *arguments: Any) -> None:
        """arguments: tensors in tuples, lists and mappings are found."""
        self._kept = _copies(_tensors(arguments))

    def put_back(self) -> None:
        """Fill them again."""
        _put_back(self._kept)


class Results:
    """Copies of what ``backward`` was called on: a step's losses."""

    def __init__(self) -> None:
        self._roots: list[torch.Tensor] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        backward = torch.autograd.backward

        def keeping_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._roots += [root.detach() for root in _tensors((tensors,))]
            backward(tensors, *args, **kwargs)

        torch.autograd.backward = keeping_backward

    def begin(self) -> None:
        """A step begins."""
        self._roots, self._kept = [], []

    def keep(self) -> None:
        """Copy them; the device has computed them by now."""
        small = [root for root in self._roots if root.numel() <= _LARGEST_RESULT]
        self._kept = _copies(small)

    def put_back(self) -> None:
        """Fill them again."""
        _put_back(self._kept)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _copies(
    tensors: Iterable[torch.Tensor],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what lies on a device, each with a copy in host memory."""
    return [
        (tensor, tensor.detach().cpu())
        for tensor in tensors
        if tensor.device.type != "cpu"
    ]


def _put_back(kept: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for tensor, copy in kept:
            tensor.copy_(copy)
