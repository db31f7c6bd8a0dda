from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from mnemosyne_plugin.adapters.megatron.evaluation import Evaluation
from mnemosyne_plugin.adapters.megatron.loop import Loop


class Rank:
    """One rank's evaluation: four micro-batches of one or more iterators each."""

    def __init__(self, num_iterators: int = 1) -> None:
        self.iterators = [
            SimpleNamespace(iterable=iter(range(1000))) for _ in range(num_iterators)
        ]
        self.stops_at: int | None = None
        self.is_skipped = False
        self.num_left_out = 0
        loop = SimpleNamespace(
            num_valid_samples=lambda of_this_rank: 4,
            leave_out_evaluation=self.leave_out,
        )
        evaluation: Any = Evaluation(self.evaluate, as_loop(loop))
        self.run = evaluation.wrapped(self.giving_up)
        self.seen: list[int] = []

    def leave_out(self) -> None:
        self.num_left_out += 1

    def evaluate(self, data_iterator: Any) -> None:
        for number in range(4):
            for each in data_iterator:
                if number == self.stops_at:
                    raise InterruptedError
                self.seen.append(next(each.iterable))

    def giving_up(self, call: Callable[..., Any]) -> Callable[..., bool]:
        def wrapper(*args: Any) -> bool:
            try:
                if self.is_skipped:
                    raise InterruptedError
                call(*args)
            except InterruptedError:
                return False
            return True

        return wrapper

    def next_evaluation(self) -> list[int]:
        self.seen, self.stops_at, self.is_skipped = [], None, False
        self.run(self.iterators)
        return self.seen


def as_loop(loop: Any) -> Loop:
    return loop  # type: ignore[no-any-return]


def test_a_whole_evaluation_takes_just_its_own_data() -> None:
    rank = Rank()
    assert rank.next_evaluation() == [0, 1, 2, 3]
    assert rank.next_evaluation() == [4, 5, 6, 7]
    assert rank.num_left_out == 0


def test_ranks_that_gave_up_at_different_places_go_on_at_the_same() -> None:
    for stops_at in range(4):
        rank = Rank()
        rank.stops_at = stops_at
        rank.run(rank.iterators)
        assert rank.next_evaluation() == [4, 5, 6, 7]
        assert rank.num_left_out == 1


def test_evaluations_that_were_not_begun_are_passed_over() -> None:
    rank = Rank(num_iterators=2)
    for _ in range(2):
        rank.is_skipped = True
        rank.run(rank.iterators)
    assert rank.next_evaluation() == [8, 8, 9, 9, 10, 10, 11, 11]


def test_a_stage_without_data_has_nothing_to_pass_over() -> None:
    rank = Rank()
    rank.iterators = []
    rank.is_skipped = True
    rank.run(None)
    assert rank.num_left_out == 1
