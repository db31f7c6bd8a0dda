"""The table of figures that the checks on a GPU add to."""

from collections.abc import Generator, Iterator

import pytest
from figures import Figures

_OUTCOME = pytest.StashKey[str]()
_WORDS = {"passed": "holds", "failed": "**does not hold**", "skipped": "not tried"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_OUTCOME] = report.outcome
    return report


@pytest.fixture(scope="session")
def all_figures() -> Iterator[Figures]:
    figures = Figures()
    yield figures
    print("\n" + figures.text())


@pytest.fixture
def figures(all_figures: Figures, request: pytest.FixtureRequest) -> Iterator[Figures]:
    """Give the table, and add to it how the test that asks for it ends."""
    yield all_figures
    name = request.node.name.removeprefix("test_").replace("_", " ")
    all_figures.add(name, _WORDS[request.node.stash[_OUTCOME]])
