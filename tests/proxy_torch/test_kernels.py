"""The host functions for torch's kernels compute what torch computes on the CPU."""

import pytest
from under_proxy import needs_torch, run

pytestmark = [needs_torch, pytest.mark.timeout(900)]


def losses(output: str) -> list[float]:
    """Return the last word of each line that begins with the number of a step."""
    return [float(line.split()[2]) for line in output.splitlines() if line[0].isdigit()]


def test_each_operation_gives_what_the_cpu_gives_and_the_same_bits_again() -> None:
    done = run("operations.py")
    assert "no host function" not in done.stderr
    assert "failed 0" in done.stdout


@pytest.mark.parametrize(
    "dtype, attention, tolerance",
    [("fp32", "math", 2e-4), ("bf16", "flash", 2e-2), ("amp", "flash", 1e-2)],
)
def test_a_gpt_learns_as_on_the_cpu(
    dtype: str, attention: str, tolerance: float
) -> None:
    arguments = ["--steps=8", f"--dtype={dtype}", f"--attention={attention}"]
    on_device = losses(run("gpt.py", *arguments).stdout)
    on_cpu = losses(run("gpt.py", *arguments, "--device=cpu", on_proxy=False).stdout)
    assert on_device[-1] < on_device[0] - 0.5
    assert on_device == pytest.approx(on_cpu, abs=tolerance)
