"""A device that a kernel has broken is back within seconds."""

import pytest
from figures import Figures
from on_gpu import KERNELS, needs_gpu, run

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(200)]


def test_a_new_server_computes_behind_each_kind_of_fault(figures: Figures) -> None:
    done = run("faults.py", timeout_s=150)
    names = ["index_assert"]
    if KERNELS.exists():
        names += ["illegal_address", "assert", "endless"]
    figures.add("first kernel, first matmul, ms", done.values("start")[2:])
    for name in names:
        lost, recovery, kernel, matmul, again = done.values(f"fault_{name}")
        figures.add(f"{name}: ms until it is told", lost)
        figures.add(f"{name}: ms of the recovery", recovery)
        figures.add(
            f"{name}: ms of the next kernel, matmul, matmul", (kernel, matmul, again)
        )
