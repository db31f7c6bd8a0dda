"""Ways of training beside the matrix: offloaded optimizers, sharded frozen bases."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from matrix.deepspeed_plan import Configuration
from matrix.runs import OK, Runs

PHASES = ("data", "backward", "mid-optimizer", "gather")


@dataclass(frozen=True)
class Way(Configuration):
    """A configuration of the matrix, with some things otherwise."""

    args: tuple[str, ...] = ()
    offloads_optimizer: bool = False

    @property
    def script_args(self) -> list[str]:
        return [*super().script_args, *self.args]

    @property
    def ds_config(self) -> dict[str, Any]:
        config = super().ds_config
        if self.offloads_optimizer:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            # DeepSpeed's own Adam for the CPU would first be compiled.
            config["zero_force_ds_cpu_optimizer"] = False
        return config


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            Way(mode="zero2", dtype="bf16", offloads_optimizer=True),
            id="optimizer offloaded to the CPU, zero 2",
        ),
        pytest.param(
            Way(mode="zero3", dtype="bf16", args=("--zero-init", "--freeze-blocks")),
            id="frozen base made under zero.Init, zero 3",
        ),
    ],
)
def test_a_death_changes_nothing(way: Way, tmp_path: Path) -> None:
    results = Runs(tmp_path).row(way, "middle", PHASES)
    assert results == dict.fromkeys(PHASES, OK)
