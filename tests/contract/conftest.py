"""Worlds of four ranks for the tests of repair and of adversity."""

from collections.abc import Iterator

import pytest
from adversity import connect
from world import World

SIZE = 4


@pytest.fixture(scope="module", params=["auto", "tcp"])
def shared(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(SIZE, request.param) as world:
        yield world


@pytest.fixture
def world(shared: World) -> World:
    """All ranks alive and linked to each other; the same processes for most tests."""
    shared.heal()
    shared.run(connect)
    return shared
