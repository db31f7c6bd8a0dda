"""A script goes back to a checkpoint behind the first step, and workers die."""

import json
from pathlib import Path

import pytest

from cluster import LocalCluster
from matrix.deepspeed_plan import Configuration
from verdict import assert_survived

SCRIPT = Path(__file__).parent / "scripts" / "load_again.py"
WAY = Configuration("zero1", "bf16")
LOADED_AT = 6


def job(folder: Path, *chaos: str) -> LocalCluster:
    """Return the job; what it logs counts on through the load."""
    folder.mkdir()
    config = folder / "ds_config.json"
    config.write_text(json.dumps(WAY.ds_config))
    args = [
        f"--deepspeed_config={config}",
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--loss-log={folder / 'losses.txt'}",
        f"--final-state={folder / 'final.txt'}",
    ]
    return LocalCluster(
        folder=folder,
        script=SCRIPT,
        script_args=args,
        num_standbys=len(chaos),
        chaos=chaos,
        procs_per_agent=3,
    )


@pytest.mark.timeout(240)
def test_a_death_in_a_load_and_one_behind_it_change_nothing(tmp_path: Path) -> None:
    with job(tmp_path / "undisturbed") as undisturbed:
        assert undisturbed.wait(100) == [0], undisturbed.output()
    kills = {1: 1, 2: 1}
    with job(
        tmp_path / "disturbed",
        f"kill rank=1 step={LOADED_AT} phase=load",
        f"kill rank=2 step={LOADED_AT + 2} phase=backward",
    ) as disturbed:
        assert disturbed.wait(100) == [0], disturbed.output()
        assert_survived(disturbed, undisturbed, kills)
    # Nobody has gone back behind the load.
    redone = [e.fields for e in disturbed.events("redo")]
    assert {fields["step"] for fields in redone if fields["epoch"] == 2} == {LOADED_AT}
    assert all(fields["step"] > LOADED_AT for fields in redone if fields["epoch"] > 2)
