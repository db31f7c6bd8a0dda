"""Megatron-LM's evaluation: on the same data on all ranks, also behind a lost one.

Each rank, each stage of a pipeline, has an iterator over the validation data that goes
on from one evaluation to the next. Where one is given up, it may be at different
micro-batches on different ranks; the next must not join one's words to another's
labels.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from mnemosyne_plugin.adapters.megatron.loop import Loop


class Evaluation:
    """Stands in place of ``evaluate_and_print_results``."""

    def __init__(self, evaluate: Callable[..., Any], loop: Loop) -> None:
        self._evaluate = evaluate
        self._loop = loop
        self._signature = inspect.signature(evaluate)

    def wrapped(
        self, giving_up: Callable[[Callable[..., Any]], Callable[..., bool]]
    ) -> Callable[..., None]:
        """Return the function; ``giving_up(call)`` tells whether it was made."""
        evaluate = giving_up(self._evaluate)

        @functools.wraps(self._evaluate)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            given = self._signature.bind(*args, **kwargs).arguments
            places = [_place(each) for each in _flat(given["data_iterator"])]
            for place in places:
                place.num_taken = 0
            if not evaluate(*args, **kwargs):
                self._loop.leave_out_evaluation()
                due = self._loop.num_valid_samples(of_this_rank=True)
                for place in places:
                    place.num_left_out += max(0, due - place.num_taken)

        return wrapper


class _Place:
    """The iterable of a RerunDataIterator, of which a part can be left out."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.num_taken = 0
        self.num_left_out = 0
        """Micro-batches to pass over when the next one is asked for."""

    def __iter__(self) -> "_Place":
        return self

    def __next__(self) -> Any:
        while self.num_left_out:
            self.num_left_out -= 1
            next(self._iterator)
        self.num_taken += 1
        return next(self._iterator)


def _flat(iterators: Any) -> Iterable[Any]:
    if isinstance(iterators, list | tuple):
        for each in iterators:
            yield from _flat(each)
    elif iterators is not None:
        yield iterators


def _place(iterator: Any) -> _Place:
    """Return what the RerunDataIterator takes from."""
    if not isinstance(iterator.iterable, _Place):
        iterator.iterable = _Place(iterator.iterable)
    place: _Place = iterator.iterable
    return place
