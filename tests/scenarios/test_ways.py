"""Ways of training beside the matrix: experts, overflows, Ulysses and more."""

from dataclasses import replace
from pathlib import Path

import pytest

from matrix import deepspeed_ways, megatron_ways
from matrix.plan import Configuration
from matrix.runs import OK, Runs

# What `make test` has time for, of `python -m tests.matrix deepspeed-ways`.
TRIED = (
    pytest.param("zero1-fp32 experts", marks=pytest.mark.long),
    "zero0-fp32 Ulysses",
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRIED)
def test_a_death_changes_nothing(name: str, tmp_path: Path) -> None:
    (way,) = (way for way in deepspeed_ways.WAYS if way.name == name)
    check(way, deepspeed_ways.PHASES, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_experts_instances_and_fp16_of_megatron_survive_together(
    tmp_path: Path,
) -> None:
    name, phases = "ep2do2-dist-fp16 alltoall, behind", ("backward", "mid-optimizer")
    (way,) = (way for way in megatron_ways.WAYS if way.name == name)
    check(replace(way, all_phases=phases), phases, tmp_path)


def check(way: Configuration, phases: tuple[str, ...], folder: Path) -> None:
    results = Runs(folder).row(way, "middle", phases)
    assert results == {phase: OK for phase in phases if way.has_phase(phase)}
