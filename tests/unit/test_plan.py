"""The transfer plan: every byte once, evenly, the same on all ranks."""

import random

import pytest

from mnemosyne_plugin.state.plan import plan


def test_every_byte_is_sent_once_and_shares_are_even() -> None:
    generator = random.Random(3)
    for _ in range(300):
        sizes = [
            generator.choice([0, 1, 4, 63, 64, 65, 1000, 70000])
            for _ in range(generator.randrange(12))
        ]
        sources = generator.sample(range(9), generator.randrange(1, 6))
        stripes = plan(sizes, sources)
        for index, size in enumerate(sizes):
            parts = [s for s in stripes if s.index == index]
            edges = [0, *(s.end for s in parts)]
            assert [s.begin for s in parts] == edges[:-1]
            assert edges[-1] == size
        shares = dict.fromkeys(sources, 0)
        for stripe in stripes:
            assert stripe.end > stripe.begin
            assert stripe.begin % 64 == 0
            shares[stripe.source] += stripe.end - stripe.begin
        even = sum(sizes) / len(sources)
        assert all(share <= even + 65 for share in shares.values())


def test_a_plan_without_sources_is_refused() -> None:
    with pytest.raises(ValueError):
        plan([1], [])
