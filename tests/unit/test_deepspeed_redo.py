"""A redone step leaves the engine as an undisturbed one: real DeepSpeed."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("deepspeed_redo_script.py")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("criterion", ["inside", "outside"])
def test_redone_steps_give_the_same_parameters(precision: str, criterion: str) -> None:
    digests = []
    for redone_steps in ("", "0,2,3"):
        command = [sys.executable, str(SCRIPT), precision, criterion, redone_steps]
        result = subprocess.run(command, capture_output=True, text=True, timeout=55)
        assert result.returncode == 0, result.stderr[-2000:]
        digests.append(result.stdout.splitlines()[-1])
    assert digests[0] == digests[1]
    assert digests[0].startswith("digest ")
