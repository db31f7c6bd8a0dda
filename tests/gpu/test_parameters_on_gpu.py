"""What the proxy reads of parameters in fat binaries is what the driver says."""

import subprocess
from pathlib import Path

import pytest
from figures import Figures
from on_gpu import BUILT, DRIVER, PYTHON, needs_gpu, run

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(200)]

PROGRAM = BUILT / "parameters"


def torch_library() -> Path:
    """Return the library that has torch's kernels."""
    code = "import importlib.util as u; print(u.find_spec('torch').origin)"
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return Path(done.stdout.strip()).parent / "lib" / "libtorch_cuda.so"


@pytest.mark.skipif(not PROGRAM.exists(), reason="parameters.cc was not built")
def test_the_driver_agrees_on_the_parameters_of_kernels(
    figures: Figures,
) -> None:
    done = run(
        PROGRAM, DRIVER, torch_library(), 2000, 60, on_proxy=False, timeout_s=150
    )
    figures.add("parameters of torch's kernels", done.output.splitlines()[-1])
