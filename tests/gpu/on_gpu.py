"""How the checks run programs: on the GPU itself, and on it by the device proxy.

With MNEMOSYNE_GPU_CHECKS=emulated both are the proxy on the emulated device, so that
the checks can be tried where there is no GPU.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from mnemosyne_plugin.proxy import preload
from ranks import on_each_rank

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PROXY_TORCH = ROOT / "tests" / "proxy_torch"
BUILT = ROOT / "build" / "gpu"
KERNELS = BUILT / "libkernels.so"
HOST_KERNELS = (
    ROOT / "build" / "proxy_torch" / "libtorch_host_kernels.so",
    BUILT / "libhost_kernels.so",
)
PYTHON = os.environ.get("MNEMOSYNE_CUDA_PYTHON", "")
IS_EMULATED = os.environ.get("MNEMOSYNE_GPU_CHECKS") == "emulated"
EMULATED = ROOT / "mnemosyne_plugin" / "proxy" / "lib" / "libmnemosyne_emulated.so"
DRIVER = str(EMULATED) if IS_EMULATED else "libcuda.so.1"


@cache
def device_name() -> str:
    """Return what the first GPU is called, with its driver; empty if there is none."""
    if IS_EMULATED:
        return "emulated device"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0].replace(", ", ", driver ") if done.returncode == 0 and lines else ""


def missing() -> str:
    """Return why the checks cannot run here; empty if they can."""
    if not PYTHON:
        return "MNEMOSYNE_CUDA_PYTHON names no python with torch: `make test-gpu`"
    return "" if device_name() else "nvidia-smi finds no GPU"


needs_gpu = pytest.mark.skipif(bool(missing()), reason=missing())
needs_kernels = pytest.mark.skipif(
    not KERNELS.exists(), reason="kernels.cu was not built: no nvcc"
)


@dataclass(frozen=True)
class Done:
    """A program that has ended well."""

    output: str
    errors: str
    seconds: float

    def values(self, name: str) -> list[str]:
        """Return the words behind `name` in the line that begins with it."""
        for line in self.output.splitlines():
            if line.split()[:1] == [name]:
                return line.split()[1:]
        raise AssertionError(f"no line {name!r} in:\n{self.output}{self.errors}")

    def number(self, name: str) -> float:
        """Return the only one."""
        (word,) = self.values(name)
        return float(word)


def run(
    program: str | Path,
    *args: object,
    on_proxy: bool = True,
    timeout_s: float = 120,
    **variables: str,
) -> Done:
    """Run a program of this folder to its end, which must be a good one.

    All that it prints is printed, and it is ended with all that it has started when
    it takes too long.
    """
    path = HERE / program
    command = [str(path), *map(str, args)]
    if path.suffix == ".py":
        command.insert(0, PYTHON)
    began = time.monotonic()
    # Files, not pipes: whoever still holds an end keeps nobody waiting.
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=_environment(on_proxy) | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    seconds = time.monotonic() - began
    name = " ".join([path.name, *map(str, args)])
    print(f"--- {name}: {seconds:.1f} s, {'proxy' if on_proxy else 'without proxy'}")
    print(*(text[-6000:] for text in texts), sep="", end="", flush=True)
    assert code is not None, f"{name} did not end in {timeout_s} s"
    assert code == 0, f"{name} ended with {code}"
    return Done(*texts, seconds)


def run_ranks(
    num_ranks: int, program: str | Path, *args: object, **variables: str
) -> list[Done]:
    """Run it once for each rank, which meet on this machine; return what each left."""
    variables = {"NCCL_SOCKET_IFNAME": "lo", **variables}
    return on_each_rank(
        num_ranks, lambda meeting: run(program, *args, **{**meeting, **variables})
    )


def _environment(on_proxy: bool) -> Mapping[str, str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{ROOT}:{PROXY_TORCH}:{ROOT / 'benchmarks'}",
        # Without it cuBLAS does not promise the same bits each time.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "MNEMOSYNE_GPU_KERNELS": str(KERNELS),
    }
    if IS_EMULATED:
        environment |= {
            "MNEMOSYNE_PROXY_DEVICE": "emulated",
            "MNEMOSYNE_EMULATED_KERNELS": ":".join(map(str, HOST_KERNELS)),
        }
    if on_proxy or IS_EMULATED:
        environment |= preload(environment)
    return environment
