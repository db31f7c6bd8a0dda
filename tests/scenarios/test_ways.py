"""Ways of training beside the matrix: offload, sharded bases, experts, Ulysses."""

from pathlib import Path

import pytest

from matrix.deepspeed_ways import PHASES, WAYS
from matrix.runs import OK, Runs

# What `make test` has time for, of `python -m tests.matrix deepspeed-ways`.
TRIED = (
    "zero1-fp32 experts",
    "zero0-fp32 Ulysses",
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRIED)
def test_a_death_changes_nothing(name: str, tmp_path: Path) -> None:
    (way,) = (way for way in WAYS if way.name == name)
    results = Runs(tmp_path).row(way, "middle", PHASES)
    assert results == {phase: OK for phase in PHASES if way.has_phase(phase)}
