"""What a step needs or has made on a device, kept where the device cannot lose it.

Training state comes back from replicas; a batch and a loss have none.
"""

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

import torch

_LARGEST_RESULT = 256  # elements; a loss has one


class Inputs:
    """Copies of the device tensors that a step is called with."""

    def __init__(self, *arguments: Any) -> None:
        """arguments: tensors in tuples, lists and mappings are found."""
        self._kept = _copies(_tensors(arguments))

    def put_back(self) -> None:
        """Fill them again."""
        _put_back(self._kept)


class Results:
    """Copies of what a step has computed for whoever calls it: its losses.

    They are what ``backward`` was called on, and small tensors in local variables of
    the functions that lead to ``optimizer.step()``.
    """

    def __init__(self) -> None:
        self._roots: list[torch.Tensor] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        backward = torch.autograd.backward

        @functools.wraps(backward)
        def keeping_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._roots += [root.detach() for root in _tensors((tensors,))]
            backward(tensors, *args, **kwargs)

        torch.autograd.backward = keeping_backward

    def begin(self) -> None:
        """A step begins."""
        self._roots, self._kept = [], []

    def keep(self, outermost: CodeType) -> None:
        """Copy them, when the device has computed them.

        outermost: of the function that called the step.
        """
        found = {id(root): root for root in self._roots}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not outermost:
            for tensor in _tensors(tuple(frame.f_locals.values())):
                found[id(tensor)] = tensor
            frame = frame.f_back
        self._kept = _copies(t for t in found.values() if t.numel() <= _LARGEST_RESULT)

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
