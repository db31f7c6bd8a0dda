"""What a step needs or has made on a device, kept where the device cannot lose it.

Training state comes back from replicas; a batch and a loss have none.
"""

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

import torch

from mnemosyne_plugin.recovery.manager import Manager

_LARGEST_RESULT = 256  # elements; a loss has one


def tell(manager: Manager) -> None:
    """Print what the device proxy is doing, if there is one."""
    if manager.has_device_proxy:
        print(f"mnemosyne: {manager.describe_device()}", file=sys.stderr, flush=True)


def refuse(manager: Manager, what_is_given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first that is true, if there is a device proxy."""
    for what, is_given in what_is_given.items():
        if is_given:
            manager.refuse_device_proxy(what)


class Copies:
    """Copies in host memory of tensors that lie on a device."""

    def __init__(self, *values: Any) -> None:
        """values: tensors in tuples, lists and mappings are found."""
        self._kept = _copies(_tensors(values))

    def put_back(self) -> None:
        """Fill them again."""
        _put_back(self._kept)


class ResultCopies:
    """The same of what a step gave the script, as long as that has not changed it.

    Small tensors only: a loss, not what it was computed from.
    """

    def __init__(self, *values: Any) -> None:
        small = [t for t in _tensors(values) if t.numel() <= _LARGEST_RESULT]
        self._kept = [(*pair, pair[0]._version) for pair in _copies(small)]

    def put_back(self) -> None:
        """Fill them again."""
        same = [(t, copy) for t, copy, version in self._kept if t._version == version]
        _put_back(same)


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
    for tensor, copy in kept:
        tensor.data.copy_(copy)  # no change in the eyes of autograd
