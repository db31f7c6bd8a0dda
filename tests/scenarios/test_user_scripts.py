"""Scripts that know nothing of us survive with the section of ds_config alone."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import LocalCluster
from matrix.runs import assert_each_step_was_logged, first_difference
from verdict import assert_survivors_stayed

SCRIPTS = Path(__file__).parent / "scripts"
NUM_RANKS = 4
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
COMMON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": ADAMW,
    "mnemosyne": {"enabled": True},
}
Job = Callable[..., LocalCluster]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("script", "args", "num_lines", "changes", "chaos"),
    [
        pytest.param(
            "gpt2",
            ["--epochs=3"],
            3 * 10,
            {
                "gradient_accumulation_steps": 1,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 3},
            },
            [
                "kill rank=1 step=4 phase=backward",
                "kill rank=3 step=11 phase=mid-optimizer",
                "kill rank=0 step=20 phase=data",
            ],
            id="gpt2 of Hugging Face in three calls, zero 3 and bf16",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "pipeline",
            ["--steps=20"],
            20,
            {"zero_optimization": {"stage": 1}},
            [
                "kill rank=0 step=3 phase=data",
                "kill rank=2 step=8 phase=backward",
                "kill rank=1 step=14 phase=gather",
            ],
            id="train_batch of a PipelineModule with its own loader, zero 1",
        ),
    ],
)
def test_an_unmodified_script_survives(
    script: str,
    args: list[str],
    num_lines: int,
    changes: dict[str, Any],
    chaos: list[str],
    cluster: Job,
    tmp_path: Path,
) -> None:
    path = SCRIPTS / f"{script}.py"
    assert "mnemosyne" not in path.read_text()
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps(COMMON | changes))

    def job_in(folder: Path, chaos: list[str]) -> LocalCluster:
        log = f"--loss_file={folder / 'losses.txt'}"
        return cluster(
            folder=folder,
            script=path,
            script_args=[*args, log, f"--deepspeed_config={config}"],
            procs_per_agent=NUM_RANKS,
            chaos=chaos,
            preload=[],
            env={"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        )

    healthy = job_in(tmp_path / "healthy", [])
    assert healthy.wait(80) == [0], healthy.output()
    check_nothing_is_left(healthy)
    assert len(healthy.losses()) == NUM_RANKS * num_lines
    job = job_in(tmp_path / "killed", chaos)
    assert job.wait(80) == [0], job.output()
    deaths = Counter(event.fields["rank"] for event in job.events("fault"))
    assert deaths.total() == len(chaos)
    assert first_difference(job, healthy) is None
    assert_each_step_was_logged(job, healthy, deaths)
    assert_survivors_stayed(job, deaths)
    check_nothing_is_left(job)


def check_nothing_is_left(job: LocalCluster) -> None:
    # A process that ends in the midst of a pass, or is killed, leaves these of its
    # loader's workers, under any launcher.
    for folder in (job.folder / "tmp").glob("pymp-*"):
        shutil.rmtree(folder)
    job.check_nothing_is_left()
