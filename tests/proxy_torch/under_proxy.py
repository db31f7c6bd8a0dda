"""How programs are run by torch's CUDA build, on the device proxy."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "mnemosyne_plugin" / "proxy" / "lib"
KERNELS = ROOT / "build" / "proxy_torch" / "libtorch_host_kernels.so"
PYTHON = os.environ.get("MNEMOSYNE_CUDA_PYTHON", "")

# It needs 5 GB of NVIDIA's libraries: not a part of `make test`.
needs_torch = pytest.mark.skipif(not PYTHON, reason="run `make test-proxy-torch`")


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of a program on the emulated device."""
    return os.environ | {
        "LD_PRELOAD": f"{LIB / 'libmnemosyne_client.so'}:{LIB / 'libcuda.so.1'}",
        "MNEMOSYNE_PROXY_DEVICE": "emulated",
        "MNEMOSYNE_EMULATED_KERNELS": str(KERNELS),
        # A kernel without a host function is an error.
        "MNEMOSYNE_EMULATED": "",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run(
    program: str, *args: str, on_proxy: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder to its end, which must be a good one."""
    done = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "proxy_torch" / program), *args],
        env=environment(**variables) if on_proxy else None,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
