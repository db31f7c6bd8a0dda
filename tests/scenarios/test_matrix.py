"""The diagonal of `python -m tests.matrix deepspeed`: all of it is `make matrix`."""

from pathlib import Path

import pytest

from matrix.plan import DIAGONAL, PHASES, Configuration
from matrix.runs import OK, Runs


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("configuration", "victim"), DIAGONAL, ids=[f"{c.name}-{v}" for c, v in DIAGONAL]
)
def test_a_death_in_every_phase_changes_nothing(
    configuration: Configuration, victim: str, tmp_path: Path
) -> None:
    results = Runs(tmp_path).row(configuration, victim, PHASES)
    assert results
    bad = {phase: result for phase, result in results.items() if result != OK}
    assert not bad, bad
