"""A newcomer's loop hands out what the lost worker's would have, bit for bit."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from mnemosyne_plugin.data import loops, resumable
from mnemosyne_plugin.data.loops import Positions
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng

NUM_EPOCHS = 3


class Noisy(Dataset[torch.Tensor]):
    """Samples that draw random numbers when they are read."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), torch.rand(()), random.random()])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(9.0)


class NoisyStream(Stream):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for sample in super().__iter__():
            yield sample + torch.rand(())


@dataclass
class Seen:
    """What a loop got, and where it was after each of its steps."""

    batches: list[Any] = field(default_factory=list)
    marks: list[tuple[Any, RngState]] = field(default_factory=list)

    def step(self, batch: Any, where: Positions) -> None:
        self.batches.append(batch)
        torch.rand(3)  # dropout
        self.marks.append((where.get(), capture_rng()))


Make = Callable[[], Any]
Loop = Callable[[Any, Callable[[Any], None], int], None]


def over_epochs(loader: Any, step: Callable[[Any], None], done: int) -> None:
    """The common loop, which knows nothing of a newcomer."""
    for epoch in range(NUM_EPOCHS):
        if hasattr(loader, "sampler") and hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            step(batch)


def from_the_epoch(loader: Any, step: Callable[[Any], None], done: int) -> None:
    for _ in range(loader.epoch, NUM_EPOCHS):
        for batch in loader:
            step(batch)


def by_next(loader: Any, step: Callable[[Any], None], done: int) -> None:
    """A loop over steps that starts at ``engine.global_steps``."""
    batches = iter(loader)
    for _ in range(done, 10):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        step(batch)


def run(
    make: Make,
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
    *,
    sought: tuple[Any, RngState] | None = None,
    done: int = 0,
    is_sought_first: bool = False,
    **options: Any,
) -> Seen:
    """Run a script; ``sought`` makes it a newcomer's."""
    where, seen = Positions(), Seen()
    monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)
    torch.manual_seed(5)
    random.seed(5)
    if sought is not None and is_sought_first:
        where.seek(*sought)
    loader = resumable(make(), **options)
    if sought is not None:
        if not is_sought_first:
            where.seek(*sought)
        restore_rng(sought[1])
        torch.rand(5)  # its set-up goes on
    loop(loader, lambda batch: seen.step(batch, where), done)
    return seen


def assert_every_place_can_be_sought(
    make: Make,
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
    stride: int = 1,
    **options: Any,
) -> None:
    whole = run(make, loop, monkeypatch, **options)
    assert len(whole.batches) > 5
    for number in range(0, len(whole.marks) - 1, stride):
        rest = run(
            make,
            loop,
            monkeypatch,
            sought=whole.marks[number],
            done=number + 1,
            is_sought_first=number % 2 == 1,
            **options,
        )
        assert_same(rest, whole, number + 1)


def assert_same(rest: Seen, whole: Seen, first: int) -> None:
    want = whole.batches[first:]
    assert len(rest.batches) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(rest.batches, want, strict=True))
    after = zip(rest.marks, whole.marks[first:], strict=True)
    for (_, rng), (_, want_rng) in after:
        assert torch.equal(rng["torch"], want_rng["torch"])
        assert rng["python"] == want_rng["python"]


def shuffled(**options: Any) -> Make:
    return lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, **options)


@pytest.mark.parametrize("loop", [over_epochs, from_the_epoch])
def test_a_shuffling_loader_in_a_loop_over_epochs(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_every_place_can_be_sought(shuffled(), loop, monkeypatch)


def test_a_loop_over_steps_starts_in_the_pass_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_every_place_can_be_sought(shuffled(), by_next, monkeypatch, catch_up=False)


@pytest.mark.parametrize("is_persistent", [False, True])
def test_random_draws_in_worker_processes_come_back(
    is_persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = shuffled(num_workers=2, persistent_workers=is_persistent)
    assert_every_place_can_be_sought(make, over_epochs, monkeypatch, stride=5)


def test_workers_draw_differently_in_every_batch_and_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator()  # so that nothing moves the global one
    make = shuffled(num_workers=1, generator=generator)

    def loop(loader: Any, step: Callable[[Any], None], done: int) -> None:
        for _ in range(2):
            for batch in loader:
                step(batch)

    noise = torch.cat(run(make, loop, monkeypatch).batches)[:, 1:]
    assert len(set(noise.flatten().tolist())) == 2 * 2 * len(Noisy())


def test_a_generator_of_the_sampler_goes_back_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> Any:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(Noisy(), batch_size=2, shuffle=True, generator=generator)

    assert_every_place_can_be_sought(make, over_epochs, monkeypatch)


def test_set_epoch_of_the_script_keeps_working(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> Any:
        sampler = DistributedSampler(Noisy(), num_replicas=2, rank=1)
        return DataLoader(Noisy(), sampler=sampler)

    assert_every_place_can_be_sought(make, over_epochs, monkeypatch)


def test_a_loader_of_single_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def single(num_workers: int) -> Make:
        return lambda: DataLoader(
            Noisy(), batch_size=None, shuffle=True, num_workers=num_workers
        )

    assert_every_place_can_be_sought(single(0), over_epochs, monkeypatch, stride=3)
    assert_every_place_can_be_sought(single(2), over_epochs, monkeypatch, stride=11)


@pytest.mark.parametrize(
    ("dataset", "num_workers", "stride"),
    [(Stream(), 0, 1), (NoisyStream(), 2, 20)],
)
def test_an_iterable_dataset_is_read_again(
    dataset: Any, num_workers: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Any:
        return DataLoader(dataset, batch_size=2, num_workers=num_workers)

    assert_every_place_can_be_sought(make, over_epochs, monkeypatch, stride=stride)


def test_any_iterable_and_a_generator_are_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_steps(batches: Any, step: Callable[[Any], None], done: int) -> None:
        for _ in range(done, 10):
            step(next(batches))

    def generator() -> Iterable[torch.Tensor]:
        yield from torch.arange(10.0)

    def plain() -> Any:
        return list(torch.arange(4.0))

    assert_every_place_can_be_sought(plain, over_epochs, monkeypatch)
    assert_every_place_can_be_sought(generator, by_steps, monkeypatch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_goes_by_its_own_state(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    class Plain(Noisy):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(float(index))

    def make() -> Any:
        data = Noisy() if num_workers == 0 else Plain()
        return torchdata.StatefulDataLoader(
            data, batch_size=2, shuffle=True, num_workers=num_workers
        )

    stride = 1 if num_workers == 0 else 7
    assert_every_place_can_be_sought(make, over_epochs, monkeypatch, stride=stride)


def test_two_loaders_have_a_position_each(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Positions()
    monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)

    def script(seen: Seen) -> None:
        train, evaluation = resumable(shuffled()()), resumable(shuffled()())
        for _ in range(NUM_EPOCHS):
            for batch in train:
                seen.step(batch, where)
            seen.batches.extend(evaluation)

    torch.manual_seed(5)
    whole = Seen()
    script(whole)
    for number, mark in enumerate(whole.marks):
        where = Positions()
        where.seek(*mark)
        rest = Seen()
        script(rest)
        # An epoch is four steps, and four batches of evaluation.
        done = number + 1 + number // 4 * 4
        left = zip(rest.batches, whole.batches[done:], strict=True)
        assert all(torch.equal(a, b) for a, b in left)


def test_a_batch_that_the_set_up_reads_is_no_batch_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = Positions()
    monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)

    def script(seen: Seen, sought: Any) -> None:
        torch.manual_seed(5)
        random.seed(5)
        loader = resumable(shuffled()())
        next(iter(loader))  # to see its shape
        if sought is not None:
            where.seek(*sought)
        over_epochs(loader, lambda batch: seen.step(batch, where), 0)

    whole = Seen()
    script(whole, None)
    for number, mark in enumerate(whole.marks[:-1]):
        where = Positions()
        rest = Seen()
        script(rest, mark)
        assert_same(rest, whole, number + 1)


def test_a_stream_that_the_set_up_has_read_from_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = Positions()
    monkeypatch.setattr("mnemosyne_plugin.data.positions", lambda: where)

    def script(seen: Seen, done: int, sought: Any) -> None:
        batches = resumable(iter(range(12)))
        assert [next(batches), next(batches)] == [0, 1]
        if sought is not None:
            where.seek(*sought)
        for _ in range(done, 8):
            seen.step(next(batches), where)

    whole = Seen()
    script(whole, 0, None)
    mark = whole.marks[3]
    where = Positions()
    rest = Seen()
    script(rest, 4, mark)
    assert rest.batches == whole.batches[4:] == [6, 7, 8, 9]


def test_a_position_is_a_snapshot_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run(shuffled(), over_epochs, monkeypatch)
    numbers = [(place[0][0], place[0][3]) for place, _ in seen.marks]
    assert numbers == [(epoch, n) for epoch in range(NUM_EPOCHS) for n in (1, 2, 3, 4)]
    assert loops.Place(*seen.marks[0][0][0]).num_batches == 1


def test_attributes_are_those_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemosyne_plugin.data.positions", Positions)
    loader = shuffled()()
    wrapper = resumable(loader)
    wrapper.extra = 7
    assert (loader.extra, wrapper.batch_size, len(wrapper)) == (7, 2, 4)
    assert wrapper.dataset is loader.dataset
    assert resumable(wrapper) is wrapper
