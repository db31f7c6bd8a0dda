"""What a lost device takes besides training state, and a step's own batches."""

from collections.abc import Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnemosyne_plugin.adapters.megatron.constants import Constants
from mnemosyne_plugin.adapters.whole_step import WholeStep
from mnemosyne_plugin.errors import FatalError
from mnemosyne_plugin.recovery.commit import Outcome


class Rotary(torch.nn.Module):
    """Makes its frequencies when it is first called, and remembers what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies: torch.Tensor | None = None
        self.scale = torch.ones(1)

    @lru_cache(maxsize=4)  # noqa: B019
    def forward(self, length: int) -> torch.Tensor:
        """Return [length]."""
        self.frequencies = torch.arange(4.0)
        return torch.arange(length) * self.scale


def test_constants_are_those_of_the_last_step_and_nothing_is_remembered() -> None:
    model = Rotary()
    constants = Constants(model, [])
    scale, before = model.scale, model(3)
    model.scale = torch.full((1,), float("nan"))
    constants.put_back()
    assert model.scale is scale
    assert model.frequencies is None  # no step that made them has ended
    after = model(3)
    assert after is not before
    assert torch.equal(after, before)
    constants.keep()
    made = model.frequencies
    model.frequencies = None
    constants.put_back()
    assert model.frequencies is made


class Manager(SimpleNamespace):
    """Has lost its device as soon as a step takes a batch."""

    def __init__(self) -> None:
        outcome = lambda: Outcome.COMMIT  # noqa: E731
        super().__init__(
            mesh=SimpleNamespace(absorb=lambda _: None),
            **dict.fromkeys(("begin", "commit", "end", "meet"), outcome),
            phase=lambda _: None,
            recover=lambda: Outcome.REDO,
            has_device_proxy=True,
            device_generation=1,
            is_device_lost=True,
            is_doomed=True,
            is_ahead=False,
            version=0,
            horizon=0,
        )


def test_a_batch_that_is_lost_with_the_device_ends_the_job() -> None:
    def batches() -> Iterator[int]:
        raise RuntimeError("CUDA error")
        yield 0

    nothing: Any = SimpleNamespace(
        **dict.fromkeys(("begin", "end", "undo"), lambda: None),
        buffers=SimpleNamespace(
            **dict.fromkeys(("begin", "end", "rewind"), lambda: None)
        ),
    )
    manager: Any = Manager()
    whole = WholeStep(manager, nothing)
    data = batches()
    with pytest.raises(FatalError, match="have iterators give batches in host memory"):
        whole.run(lambda: whole.take(0, lambda: next(data)))
