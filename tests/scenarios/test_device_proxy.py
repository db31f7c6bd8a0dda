"""Unmodified CUDA programs on the device proxy, whose server is killed anywhere.

The programs are built by `make cpp` (tests/cpp/cuda), where nvcc is.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "mnemosyne_plugin" / "proxy" / "lib"
PROGRAMS = ROOT / "build" / "cpp" / "cuda"

pytestmark = pytest.mark.skipif(
    not (PROGRAMS / "mlp").exists(), reason="no CUDA programs; `make cpp` needs nvcc"
)


def run(program: str, *args: str, device: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of tests/cpp/cuda on the emulated device, with these faults."""
    environment = os.environ | {
        "LD_PRELOAD": str(LIB / "libmnemosyne_client.so"),
        "MNEMOSYNE_PROXY_DEVICE": "emulated",
        "MNEMOSYNE_EMULATED_KERNELS": str(PROGRAMS / "libhost_kernels.so"),
        "MNEMOSYNE_EMULATED": device,
    }
    return subprocess.run(
        [str(PROGRAMS / program), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def servers() -> set[int]:
    """Return the proxy servers that are alive."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "exe") == str(LIB / "mnemosyne-proxy"):
                found.add(int(entry.name))
        except OSError:
            continue  # ended, or not ours to look at
    return found


@pytest.mark.parametrize("program", ["vector_add", "symbols"])
def test_a_program_computes_on_the_proxy_what_it_should(program: str) -> None:
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_server_killed_at_any_command_changes_no_weight() -> None:
    undisturbed = run("mlp", "3")
    assert undisturbed.returncode == 0, undisturbed.stderr
    index = 0
    while True:
        killed = run("mlp", "3", device=f"fault=kill,at={index},server=1")
        assert killed.stdout == undisturbed.stdout, f"{index}: {killed.stderr}"
        if "the device failed" not in killed.stderr:
            break  # the program has fewer commands
        index += 1
    assert index > 40  # 3 steps of 15 operations, and the copies in front of them
    assert not servers()


@pytest.mark.parametrize("fault", ["illegal_address", "assert", "ecc"])
def test_a_fault_of_the_device_is_reported_as_what_it_is(fault: str) -> None:
    undisturbed = run("mlp", "2")
    broken = run("mlp", "2", device=f"fault={fault},at=20,server=1")
    code = {"illegal_address": 700, "assert": 710, "ecc": 214}[fault]
    assert f"({code})" in broken.stderr
    assert broken.stdout == undisturbed.stdout
    assert not servers()


def test_a_device_that_does_not_come_back_is_an_error() -> None:
    lost = run("mlp", "2", device="fault=lost_device,at=20,server=1")
    assert lost.returncode == 1
    assert "the device failed" in lost.stderr
    assert not servers()


def test_a_device_without_memory_says_so() -> None:
    assert "out of memory" in run("mlp", "1", device="memory=4m").stderr
