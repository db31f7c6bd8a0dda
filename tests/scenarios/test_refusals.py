"""What we cannot protect is refused: silently off would be the worst failure."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import CONFIGS, ROOT, LocalCluster

Job = Callable[..., LocalCluster]


def config_with(folder: Path, **changes: Any) -> str:
    """Write the example's ds_config with some sections changed; return the option."""
    config = json.loads((CONFIGS / "ds_config_gpt.json").read_text())
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config | changes))
    return f"--deepspeed_config={path}"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mnemosyne": {"enabled": True, "no_such_key": 1}}, "no_such_key"),
        ({"mnemosyne": {"enabled": "yes"}}, "enabled"),
        ({"managed_gradient_accumulation": False}, "accumulation"),
        ({"mnemosyne": {"redundancy": "buddy", "buddies": 2}}, "mnemosyne.buddies"),
        (
            {
                "mnemosyne": {"redundancy": "replica"},
                "zero_optimization": {"stage": 2},
            },
            "mnemosyne.redundancy",
        ),
    ],
)
def test_a_config_that_we_cannot_serve_ends_the_job_at_its_start(
    changes: dict[str, Any], named: str, cluster: Job, tmp_path: Path
) -> None:
    log = tmp_path / "losses.txt"
    args = [config_with(tmp_path, **changes), "--steps=3", f"--loss-log={log}"]
    job = cluster(script_args=args, procs_per_agent=2, num_standbys=0)
    codes = job.wait(45)
    # What the launcher sees by itself is a wrong use of it.
    assert codes == [2] or (codes != [0] and "ConfigError" in job.output())
    assert named in job.output().lower()
    assert not job.losses()
    job.check_nothing_is_left()


def test_a_section_that_is_not_enabled_leaves_deepspeed_untouched(
    cluster: Job, tmp_path: Path
) -> None:
    log = tmp_path / "losses.txt"
    off = config_with(tmp_path, mnemosyne={"enabled": False})
    job = cluster(
        script_args=[off, "--steps=3", f"--loss-log={log}"],
        procs_per_agent=2,
        num_standbys=0,
    )
    assert job.wait(45) == [0], job.output()
    assert len(job.losses()) == 6
    job.check_nothing_is_left()


def test_plain_torchrun_is_refused_with_what_to_do_instead() -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    # Not train.py itself: outside of `mnemosyne run` DeepSpeed would compile an op.
    script = ROOT / "benchmarks" / "plain_train.py"
    command = [torchrun, "--standalone", "--nproc-per-node=1", script, "--steps=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert ended.returncode != 0
    assert "mnemosyne run" in ended.stdout + ended.stderr
