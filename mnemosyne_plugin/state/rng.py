"""The random number generators of this process, remembered and put back."""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch

RngState = dict[str, Any]

_more: "dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]" = {}


def add_rng(
    name: str, capture: Callable[[], Any], restore: Callable[[Any], None]
) -> None:
    """Have one more generator, of a trainer, remembered and put back.

    capture: returns something that can be pickled and compared.
    """
    _more[name] = capture, restore


def capture_rng() -> RngState:
    """Return the state of every generator that is in use. Host-side, about 30 us."""
    state: RngState = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    for name, (capture, _) in _more.items():
        state[name] = capture()
    return state


def restore_rng(state: RngState) -> None:
    """Put back what ``capture_rng`` returned, here or in another process."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    for name, (_, restore) in _more.items():
        if name in state:
            restore(state[name])


def same_rng(one: RngState, other: RngState) -> bool:
    """Tell whether no generator moved between two captures."""
    if one.keys() != other.keys() or one["python"] != other["python"]:
        return False
    if not torch.equal(one["torch"], other["torch"]):
        return False
    if "numpy" in one and not _same_numpy(one["numpy"], other["numpy"]):
        return False
    if any(one[name] != other[name] for name in _more if name in one):
        return False
    return all(
        torch.equal(a, b)
        for a, b in zip(one.get("cuda", ()), other.get("cuda", ()), strict=True)
    )


def _same_numpy(one: Any, other: Any) -> bool:
    return bool(one[2:] == other[2:] and (one[1] == other[1]).all())
