"""How programs are run by torch's CUDA build, on the device proxy."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mnemosyne_plugin.events import read_events
from ranks import on_each_rank

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
LIB = ROOT / "mnemosyne_plugin" / "proxy" / "lib"
KERNELS = ROOT / "build" / "proxy_torch" / "libtorch_host_kernels.so"
ENTRY_POINT = ROOT / "build" / "proxy_torch"
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
        "PYTHONPATH": f"{ROOT}:{ENTRY_POINT}",
        **variables,
    }


def launch(
    program: str,
    *args: str,
    launcher: Sequence[str],
    exit_code: int = 0,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder by `mnemosyne run --device-proxy`."""
    # The extension in the tree serves torch's CUDA build of the same version as well.
    command = [PYTHON, "-m", "mnemosyne_plugin.cli", "run", "--device-proxy", *launcher]
    everything = environment(**variables)
    del everything["LD_PRELOAD"]  # the launcher's business
    return _finish([*command, str(HERE / program), *args], everything, exit_code)


@dataclass(frozen=True)
class Job:
    """What a job has left."""

    lines: set[str]
    """Of the log, which each rank has written its own of."""
    num_recoveries: Mapping[int, int]
    ranks_that_hung: Sequence[int]
    pids: set[tuple[int, int]]
    """Of each rank's workers."""
    groups: set[tuple[int, tuple[int, ...]]]
    kept: Sequence[int]
    """How many groups each rank has used on in each repair."""
    received: Sequence[tuple[int, int]]
    """The bytes that each newcomer got of replicas, and those straight from devices."""
    broken: Sequence[tuple[int, str]]
    """Ranks whose device has cost them a worker, and what would help."""
    output: str


def train(
    program: str,
    folder: Path,
    *args: str,
    device_timeout_s: int | None = 2,
    preload: str = "torch",
    num_ranks: int = 2,
    chaos: Sequence[str] = (),
    exit_code: int = 0,
    **variables: str,
) -> Job:
    """Run a training program of this folder to its end, with this exit code."""
    _make_entry_point()
    run_dir = folder / "run"
    launcher = [
        f"--nproc-per-node={num_ranks}",
        f"--preload={preload}",
        f"--run-dir={run_dir}",
        *(f"--chaos={event}" for event in chaos),
    ]
    if device_timeout_s is not None:
        launcher.append(f"--device-timeout={device_timeout_s}")
    log = f"--log={folder / 'log'}"
    done = launch(
        *(program, *args, log), launcher=launcher, exit_code=exit_code, **variables
    )
    events = read_events(run_dir)
    recovered = [e.fields["rank"] for e in events if e.name == "device_recovered"]
    groups = [e.fields for e in events if e.name == "groups"]
    return Job(
        lines=set((folder / "log").read_text().splitlines()),
        num_recoveries={rank: recovered.count(rank) for rank in set(recovered)},
        ranks_that_hung=[e.fields["rank"] for e in events if e.name == "device_hangs"],
        pids={
            (e.fields["rank"], e.fields["pid"]) for e in events if e.name == "seated"
        },
        groups={(each["rank"], tuple(each["ids"])) for each in groups},
        kept=[e.fields["kept"] for e in events if e.name == "device_groups"],
        received=[
            (e.fields["bytes"], e.fields["from_devices"])
            for e in events
            if e.name == "state_received"
        ],
        broken=[
            (e.fields["rank"], e.fields["cure"])
            for e in events
            if e.name == "device_failed"
        ],
        output=done.stdout + done.stderr,
    )


def _make_entry_point() -> None:
    """Have torch find our hooks, as if the package was installed for that python."""
    folder = ENTRY_POINT / "mnemosyne_plugin-0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Name: mnemosyne-plugin\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        "[torch.backends]\nmnemosyne = mnemosyne_plugin.autoload:autoload\n"
    )


def run(
    program: str, *args: str, on_proxy: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder to its end, which must be a good one."""
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return _finish(
        [PYTHON, str(HERE / program), *args],
        environment(**variables) if on_proxy else alone,
    )


def _finish(
    command: Sequence[str], variables: dict[str, str] | None, exit_code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == exit_code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_ranks(
    world_size: int, program: str, *args: str, on_proxy: bool = True
) -> list[subprocess.CompletedProcess[str]]:
    """Run one for each rank, which meet on this machine."""
    return on_each_rank(
        world_size,
        lambda variables: run(program, *args, on_proxy=on_proxy, **variables),
    )
