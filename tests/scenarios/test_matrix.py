"""The diagonals of `python -m tests.matrix`: all of it is `make matrix`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from matrix import deepspeed_plan, megatron_plan
from matrix.plan import Configuration
from matrix.runs import OK, Runs

ROWS = (*deepspeed_plan.DIAGONAL, *megatron_plan.DIAGONAL)
# The longest of them, and what test_user_scripts, test_redundancy and
# test_megatron_pretrain have in part.
LONG = ("pp2v2-plain+overlap-fp32", "pipe+zero1-bf16", "zero3-fp32", "tp2-dist-fp32")


def parameters() -> Iterator[Any]:
    for configuration, victim in ROWS:
        name = configuration.name
        marks = [pytest.mark.long] if name in LONG else []
        yield pytest.param(configuration, victim, id=f"{name}-{victim}", marks=marks)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("configuration", "victim"), parameters())
def test_a_death_in_every_phase_changes_nothing(
    configuration: Configuration, victim: str, tmp_path: Path
) -> None:
    results = Runs(tmp_path).row(configuration, victim, configuration.all_phases)
    assert results
    bad = {phase: result for phase, result in results.items() if result != OK}
    assert not bad, bad
