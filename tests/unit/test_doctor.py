"""`mnemosyne doctor`: judged by made-up findings, found on made-up machines."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

from mnemosyne_plugin import autoload, cli, proxy
from mnemosyne_plugin.doctor import (
    coverage,
    examination,
    installation,
    machine,
    probes,
    telling,
)
from mnemosyne_plugin.doctor.findings import (
    VARIABLES,
    DeviceGroups,
    Extension,
    Findings,
    Gpu,
    Gpus,
    Interface,
    Limits,
    Package,
    Proxy,
    RdmaPort,
    Torch,
)
from mnemosyne_plugin.doctor.gaps import Gap, gaps, is_protected
from mnemosyne_plugin.doctor.uses import uses

ROOT = Path(__file__).resolve().parents[2]
NCCL = DeviceGroups(by="NCCL")

ON_CPU = Findings(
    version="0.1.0",
    python="3.11.7, /usr/bin/python3",
    torch=Torch(version="2.13.0+cpu", has_hooks=True),
    extension=Extension(),
    built_for="2.13.0",
    gpus=Gpus(),
    proxy=Proxy(unsupported=()),
    interfaces=(Interface(name="eth0", addresses=("10.0.0.2",), speed_mbit=25000),),
    rdma=(),
    limits=Limits(open_files=(65536, 65536), locked_bytes=(-1, -1), shm_bytes=1 << 36),
    packages=(Package(name="DeepSpeed", version="0.19.8"),),
)
ON_GPUS = replace(
    ON_CPU,
    torch=Torch(version="2.13.0+cu130", cuda="13.0", nccl=(2, 29, 7), has_hooks=True),
    extension=Extension(groups_with_proxy=NCCL),
    gpus=Gpus(
        driver="580.82",
        driver_cuda=(13, 0),
        gpus=(
            Gpu(name="H100", uuid="GPU-aa", memory_bytes=80 << 30),
            Gpu(name="H100", uuid="GPU-bb", memory_bytes=80 << 30),
        ),
    ),
    proxy=Proxy(unsupported=("cuFileRead",)),
)
WITH_PROXY = replace(ON_GPUS, with_proxy=True)
WITH_GROUPS = replace(
    ON_GPUS,
    extension=Extension(groups=NCCL, groups_with_proxy=NCCL),
    environment={"MNEMOSYNE_DEVICE_GROUPS": "nccl"},
)


def torch_with(findings: Findings, **changes: Any) -> Findings:
    assert findings.torch is not None
    return replace(findings, torch=replace(findings.torch, **changes))


def decisive(findings: Findings) -> list[str]:
    return [gap.what for gap in gaps(findings) if gap.is_decisive]


def others(findings: Findings) -> list[str]:
    return [gap.what for gap in gaps(findings) if not gap.is_decisive]


def means(findings: Findings, purpose: str) -> str:
    (found,) = [use.means for use in uses(findings) if use.purpose == purpose]
    return found


# --- the verdict ------------------------------------------------------------------


def test_a_healthy_machine_without_gpus_is_protected() -> None:
    assert gaps(ON_CPU) == []
    assert is_protected(ON_CPU)
    assert "mnemosyne" in means(ON_CPU, "tensors in host memory")
    assert "without CUDA" in means(ON_CPU, "tensors on GPUs")


def test_gpus_are_protected_only_by_what_moves_their_tensors() -> None:
    assert decisive(ON_GPUS) == ["nothing protects tensors on GPUs: NCCL is refused"]
    assert "refused" in means(ON_GPUS, "tensors on GPUs")
    for findings in (WITH_PROXY, WITH_GROUPS):
        assert is_protected(findings)
    assert "NCCL 2.29.7" in means(ON_GPUS, "with --device-proxy")
    assert "in the worker" in means(WITH_GROUPS, "tensors on GPUs")
    assert others(WITH_GROUPS) == ["a GPU fault ends its worker"]


def test_gpus_that_no_job_would_see_do_not_count() -> None:
    hidden = replace(ON_GPUS, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert is_protected(hidden)
    for_cpu = replace(ON_CPU, gpus=ON_GPUS.gpus)
    assert is_protected(for_cpu)
    assert "the GPUs are not used" in others(for_cpu)[0]


def test_groups_that_would_end_a_worker_at_its_start_decide() -> None:
    broken = Extension(groups=DeviceGroups(error="nccl: this torch finds no GPU"))
    for machine_of in (WITH_GROUPS, ON_CPU):
        (what,) = decisive(replace(machine_of, extension=broken))
        assert "this torch finds no GPU" in what
    findings = replace(WITH_GROUPS, extension=broken)
    assert "this torch finds no GPU" in means(findings, "tensors on GPUs")


@pytest.mark.parametrize("findings", [WITH_PROXY, WITH_GROUPS])
def test_an_old_nccl_decides_where_it_would_be_used(findings: Findings) -> None:
    (what,) = decisive(torch_with(findings, nccl=(2, 13, 4)))
    assert "NCCL 2.13.4 has no non-blocking communicators" in what
    assert not decisive(torch_with(findings, nccl=(2, 14, 3)))
    unused = torch_with(ON_GPUS, nccl=(2, 13, 4))
    assert "NCCL 2.13.4" not in " ".join(decisive(unused))


@pytest.mark.parametrize(
    "version", ["2.10.1", "2.14.0", "2.13.0a0+nv26.08", "2.13.0rc2", "unknown"]
)
def test_a_torch_that_was_not_tried_decides(version: str) -> None:
    findings = torch_with(replace(ON_CPU, built_for=""), version=version)
    (what,) = decisive(findings)
    assert what == f"torch {version} is not covered, only 2.11 to 2.13"


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0.post1"])
def test_a_torch_that_was_tried_does_not(version: str) -> None:
    assert is_protected(torch_with(replace(ON_CPU, built_for=""), version=version))


def test_an_extension_for_another_torch_decides_even_if_it_loads() -> None:
    (what,) = decisive(replace(ON_CPU, built_for="2.12.1"))
    assert "built for torch 2.12.1" in what


def test_no_extension_decides() -> None:
    without = replace(ON_CPU, extension=Extension(error="undefined symbol: _ZN3c10"))
    (what,) = decisive(without)
    assert "undefined symbol: _ZN3c10" in what
    assert means(without, "tensors in host memory").startswith("nothing")
    crashed = replace(ON_CPU, extension=None, unknown={"extension": "ended by SIGSEGV"})
    assert "ended by SIGSEGV" in decisive(crashed)[0]


@pytest.mark.parametrize(
    ("missing", "findings"),
    [("torch", ON_CPU), ("gpus", ON_GPUS), ("packages", ON_CPU), ("proxy", WITH_PROXY)],
)
def test_what_cannot_be_found_out_is_never_taken_for_protected(
    missing: str, findings: Findings
) -> None:
    changes: dict[str, Any] = {missing: None, "unknown": {missing: "it hangs"}}
    assert any("it hangs" in what for what in decisive(replace(findings, **changes)))


def test_unknown_gpus_do_not_matter_to_a_torch_without_cuda() -> None:
    assert is_protected(replace(ON_CPU, gpus=None, unknown={"gpus": "it hangs"}))


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"proxy": Proxy(error="no library")}, "was not built"),
        ({"proxy": Proxy(), "unknown": {"proxy": "torn"}}, "does not load: torn"),
        ({"torch": ON_CPU.torch}, "built without CUDA"),
        ({"gpus": Gpus()}, "no GPU: none is seen"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "7"}}, "no GPU: none is seen"),
    ],
)
def test_what_is_in_the_way_of_the_device_proxy(
    changes: dict[str, Any], want: str
) -> None:
    findings = replace(WITH_PROXY, **changes)
    (what,) = decisive(findings)
    assert want in what
    assert want in means(findings, "with --device-proxy")
    # Without the option it is no reason against a job on the CPU.
    assert is_protected(replace(ON_CPU, proxy=Proxy(error="no library")))


def test_the_device_proxy_speaks_one_version_of_cuda() -> None:
    (what,) = decisive(torch_with(WITH_PROXY, cuda="12.8"))
    assert what == "the device proxy speaks CUDA 13, and this torch CUDA 12.8"
    (what,) = decisive(torch_with(WITH_PROXY, nccl=None))
    assert what == "this torch has no NCCL"


def test_an_emulated_device_is_one() -> None:
    emulated = replace(
        WITH_PROXY, gpus=Gpus(), environment={"MNEMOSYNE_PROXY_DEVICE": "emulated"}
    )
    assert is_protected(emulated)
    assert "the emulated device" in means(emulated, "with --device-proxy")


def test_an_old_driver_decides_and_a_lost_gpu_is_told() -> None:
    assert WITH_PROXY.gpus is not None
    old = replace(WITH_PROXY.gpus, driver="535.1", driver_cuda=(12, 2))
    (what,) = decisive(replace(WITH_PROXY, gpus=old))
    assert what == "driver 535.1 serves CUDA 12.2, and this torch is built for 13.0"
    lost = replace(WITH_PROXY.gpus, gpus=(*old.gpus, Gpu(error="GPU is lost")))
    findings = replace(WITH_PROXY, gpus=lost)
    assert is_protected(findings)
    assert "GPU 2 does not answer: GPU is lost" in others(findings)


@pytest.mark.parametrize(
    ("named", "want"),
    [
        (None, ["GPU-aa", "GPU-bb"]),
        ("", []),
        ("-1", []),
        ("1", ["GPU-bb"]),
        ("1, 0", ["GPU-bb", "GPU-aa"]),
        ("0,5,1", ["GPU-aa"]),
        ("GPU-b", ["GPU-bb"]),
        ("MIG-GPU-aa/1/0", ["GPU-aa", "GPU-bb"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(
    named: str | None, want: list[str]
) -> None:
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    findings = replace(ON_GPUS, environment=environment)
    assert [gpu.uuid for gpu in findings.visible_gpus] == want


@pytest.mark.parametrize(
    ("name", "version", "is_covered"),
    [
        ("DeepSpeed", "0.19.8", True),
        ("DeepSpeed", "0.19.9+abc", True),
        ("DeepSpeed", "0.19.7", False),
        ("DeepSpeed", "0.20.0", False),
        ("DeepSpeed", "", False),
        ("megatron.core", "0.16.1", True),
        ("megatron.core", "0.17.0rc0", False),
        ("megatron.core", "0.20.0", False),
        ("Megatron-LM", "0.16.1", False),
        ("Megatron-LM", "0.19.2", True),
        ("Transformer Engine", "2.9.0", True),  # not tried: a word at start, no more
        ("NVIDIA's apex", "0.1", True),
    ],
)
def test_a_trainer_of_another_version_decides(
    name: str, version: str, is_covered: bool
) -> None:
    findings = replace(ON_CPU, packages=(Package(name=name, version=version),))
    assert is_protected(findings) == is_covered
    if not is_covered:
        assert str(coverage.PACKAGES[name]) in decisive(findings)[0]


def test_an_apex_that_is_not_nvidias_is_told_and_decides_nothing() -> None:
    apex = Package(name="NVIDIA's apex", version="0.9.10dev", is_other=True)
    findings = replace(ON_CPU, packages=(apex,))
    assert is_protected(findings)
    assert "is not NVIDIA's" in others(findings)[0]
    assert "not NVIDIA's: 0.9.10dev" in telling.text(findings)


def test_a_trainer_without_our_hooks_decides() -> None:
    findings = torch_with(ON_CPU, has_hooks=False)
    assert "DeepSpeed would run without us" in decisive(findings)[0]
    assert "PYTHONPATH is not enough" in gaps(findings)[0].remedy
    off = replace(findings, environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert gaps(off)[0].remedy == "unset TORCH_DEVICE_BACKEND_AUTOLOAD"
    # Who calls `attach`, or has a patched source tree, needs none.
    for packages in (
        (),
        (Package(name="megatron.core", version="0.17.0"),),
        (Package(name="Megatron-LM", version="0.17.0", is_patched=True),),
    ):
        assert is_protected(replace(findings, packages=packages))


def test_torchcomms_in_our_place_decides() -> None:
    for value, is_on in (("1", True), ("0", False), ("", False)):
        environment = {"TORCH_DISTRIBUTED_USE_TORCHCOMMS": value}
        findings = replace(ON_CPU, environment=environment)
        assert is_protected(findings) != is_on


def test_small_limits_are_told_where_they_matter() -> None:
    small = Limits(open_files=(256, 4096), locked_bytes=(65536, -1), shm_bytes=64 << 20)
    port = RdmaPort(name="mlx5_0:1", kind="RoCE", rate="400 Gb/sec", state="ACTIVE")
    assert len(others(replace(ON_CPU, limits=small, rdma=(port,)))) == 1
    found = others(replace(WITH_GROUPS, limits=small, rdma=(port,)))
    assert [what.split(":")[0] for what in found[1:]] == [
        "a worker may open 256 files",
        "/dev/shm has 64 MiB",
        "a worker may lock 64 KiB",
    ]
    assert is_protected(replace(ON_CPU, limits=small))


def test_what_decides_comes_first_and_everything_has_a_remedy() -> None:
    worst = torch_with(ON_GPUS, version="2.10.0", has_hooks=False)
    apex = Package(name="NVIDIA's apex", version="0.9", is_other=True)
    worst = replace(worst, packages=(apex, Package(name="DeepSpeed", version="0.1")))
    found = gaps(worst)
    assert len(found) == 6
    assert found == sorted(found, key=lambda gap: not gap.is_decisive)
    assert all(gap.remedy for gap in found)


# --- the versions -----------------------------------------------------------------


def test_the_covered_versions_are_those_that_setup_and_tests_name() -> None:
    setup = (ROOT / "setup.py").read_text()
    extras = dict(re.findall(r'"([\w-]+)>=([\w.,<]+)"', setup))
    for name, package in (
        ("deepspeed", "DeepSpeed"),
        ("megatron-core", "megatron.core"),
    ):
        first, _, end = extras[name].partition(",<")
        want = coverage.Versions(coverage.parse(first), coverage.parse(end))
        assert coverage.PACKAGES[package] == want
    imports = (ROOT / "tests/unit/torch_imports.txt").read_text()
    for version in re.search(r"^\[([\d. ]+)\]", imports, re.M).group(1).split():
        assert coverage.TORCH.cover(version)
    libraries = (ROOT / "csrc/proxy/libraries.cc").read_text()
    assert f'"libcudart.so.{coverage.PROXY_CUDA}"' in libraries


@pytest.mark.parametrize(
    ("version", "abilities"),
    [
        ((2, 13, 4), ""),
        ((2, 26, 5), "non-blocking communicators"),
        ((2, 27, 3), "non-blocking communicators, shrink"),
        ((2, 28, 9), "non-blocking communicators, shrink, revoke"),
        ((2, 29, 7), "non-blocking communicators, shrink, revoke, grow"),
        (
            (2, 30, 3),
            "non-blocking communicators, shrink, revoke, grow, several ranks on a GPU",
        ),
    ],
)
def test_what_nccl_can_do_follows_from_its_version(
    version: tuple[int, ...], abilities: str
) -> None:
    text = " ".join(telling.text(torch_with(ON_GPUS, nccl=version)).split())
    assert ", ".join(re.findall(r"(\w[\w -]*): yes", text)) == abilities


# --- what it says -----------------------------------------------------------------


@pytest.mark.parametrize("findings", [ON_CPU, ON_GPUS, WITH_PROXY])
def test_the_text_is_aligned_and_fits(findings: Findings) -> None:
    lines = telling.text(findings).splitlines()
    assert max(map(len, lines)) <= 100
    begin = lines[1].index(findings.version)
    rows = [line for line in lines if re.match(r"  \w", line)]
    assert all(row[begin - 1] == " " != row[begin] for row in rows)
    assert lines[0] == "FOUND"
    assert "WILL BE USED" in lines


def test_a_piece_that_could_not_be_looked_at_is_told_as_such() -> None:
    names = ("torch", "gpus", "interfaces", "rdma", "limits", "packages", "proxy")
    unknown = {name: f"{name} broke" for name in names}
    changes: dict[str, Any] = dict.fromkeys(names)
    findings = replace(ON_CPU, **changes, extension=None, unknown=unknown)
    text = telling.text(findings)
    for name in names:
        assert f"unknown: {name} broke" in text
    assert json.loads(json.dumps(telling.data(findings)))["is_protected"] is False


def test_the_data_has_what_the_text_has() -> None:
    data = json.loads(json.dumps(telling.data(WITH_PROXY)))
    assert data["command"] == "mnemosyne run --device-proxy"
    assert data["is_protected"] is True
    assert data["found"]["gpus"]["gpus"][1]["uuid"] == "GPU-bb"
    assert [Gap(**each) for each in data["not_protected"]] == gaps(WITH_PROXY)
    assert len(data["used"]) == len(uses(WITH_PROXY))


# --- looking, on made-up machines -------------------------------------------------


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def package_info(version: str) -> str:
    names = ("MAJOR", "MINOR", "PATCH")
    numbers = zip(names, version.split("."), strict=True)
    return "".join(f"{n} = {v}\n" for n, v in numbers) + 'PRE_RELEASE = "rc1"\n'


def found_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Package]:
    for name in ("deepspeed", "megatron", "apex", "transformer_engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of other tests
    monkeypatch.setattr(sys, "path", [str(folder)])
    return {package.name: package for package in installation.packages()}


def test_trainers_are_found_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    bomb = "raise SystemExit('imported')"
    for name in ("deepspeed", "apex", "transformer_engine"):
        write(tmp_path / name / "__init__.py", bomb)
    write(tmp_path / "deepspeed-0.19.8.dist-info/METADATA", "Version: 0.19.8\n")
    write(tmp_path / "apex/optimizers/__init__.py", bomb)
    write(tmp_path / "megatron/core/__init__.py", bomb)
    write(tmp_path / "megatron/core/package_info.py", package_info("0.18.0"))
    write(tmp_path / "megatron/training/arguments.py", "def parse_args(): ...")
    # when
    found = found_in(tmp_path, monkeypatch)
    # then
    assert found["DeepSpeed"].version == "0.19.8"
    assert found["megatron.core"].version == "0.18.0rc1"
    assert found["Megatron-LM"] == Package(name="Megatron-LM", version="0.18.0rc1")
    assert found["NVIDIA's apex"] == Package(name="NVIDIA's apex")
    assert "Transformer Engine" in found

    # given a source tree with our patch, and the project of PyPI that is called apex
    write(tmp_path / "megatron/training/arguments.py", "import mnemosyne_plugin")
    (tmp_path / "apex/optimizers/__init__.py").unlink()
    (tmp_path / "apex/optimizers").rmdir()
    # when
    found = found_in(tmp_path, monkeypatch)
    # then
    assert found["Megatron-LM"].is_patched
    assert found["NVIDIA's apex"].is_other


def test_nothing_is_found_where_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found_in(tmp_path, monkeypatch) == {}


def test_rdma_devices_are_told_apart_by_their_link(tmp_path: Path) -> None:
    for name, kind in (("mlx5_0", "InfiniBand"), ("mlx5_1", "Ethernet")):
        port = tmp_path / name / "ports" / "1"
        write(port / "link_layer", f"{kind}\n")
        write(port / "rate", "400 Gb/sec (4X NDR)\n")
        write(port / "state", "4: ACTIVE\n")
    first, second = machine.rdma_ports(tmp_path)
    assert first == RdmaPort(
        name="mlx5_0:1", kind="InfiniBand", rate="400 Gb/sec (4X NDR)", state="ACTIVE"
    )
    assert (second.name, second.kind) == ("mlx5_1:1", "RoCE")
    assert machine.rdma_ports(tmp_path / "nothing") == ()


def test_the_loopback_is_no_network() -> None:
    names = [interface.name for interface in machine.interfaces()]
    assert "lo" not in names


FAKE_NVML = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int gpus[2];
int nvmlInit_v2() { if (getenv("FAKE_HANGS")) sleep(600);
  if (getenv("FAKE_ABORTS")) abort(); return 0; }
const char* nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : "?"; }
int nvmlSystemGetDriverVersion(char* s, unsigned n) { strcpy(s, "580.82"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* v) { *v = 13010; return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** d) { *d = gpus + i; return 0; }
int nvmlDeviceGetName(void* d, char* s, unsigned n) {
  if (d == gpus + 1) return 15; strcpy(s, "NVIDIA H100"); return 0; }
int nvmlDeviceGetUUID(void* d, char* s, unsigned n) { strcpy(s, "GPU-aa"); return 0; }
int nvmlDeviceGetMemoryInfo(void* d, unsigned long long* m) {
  m[0] = 80ULL << 30; m[1] = m[2] = 0; return 0; }
"""


def build_library(path: Path, source: str) -> None:
    subprocess.run(
        ["c++", "-x", "c", "-shared", "-fPIC", "-w", "-o", str(path), "-"],
        input=source,
        text=True,
        check=True,
        timeout=50,
    )


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a made-up library tells of the GPUs."""
    folder = tmp_path_factory.mktemp("nvml")
    build_library(folder / "libnvidia-ml.so.1", FAKE_NVML)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def test_the_driver_is_asked_for_its_gpus_and_a_lost_one_hides_no_other(
    nvml: dict[str, str],
) -> None:
    answers, why = probes.ask("gpus", 50, nvml)
    assert why == ""
    assert examination._gpus(answers) == Gpus(
        driver="580.82",
        driver_cuda=(13, 1),
        gpus=(
            Gpu(name="NVIDIA H100", uuid="GPU-aa", memory_bytes=80 << 30),
            Gpu(error="nvmlDeviceGetName: GPU is lost"),
        ),
    )


def test_a_driver_that_hangs_or_crashes_is_told_as_such(
    nvml: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[Any] = []

    def start(*args: Any, **options: Any) -> Any:
        children.append(popen(*args, **options))
        return children[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(probes.subprocess, "Popen", start)
    begun = time.monotonic()
    assert probes.ask("gpus", 2, {**nvml, "FAKE_HANGS": "1"}) == (
        {},
        "no answer within 2 s",
    )
    assert time.monotonic() - begun < 30
    assert children[0].returncode == -signal.SIGKILL
    _, why = probes.ask("gpus", 50, {**nvml, "FAKE_ABORTS": "1"})
    assert why == "its process ended by SIGABRT"


def test_a_child_has_no_device_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = proxy.preload({"LD_PRELOAD": "/lib/theirs.so"})
    assert proxy.unloaded(ours)["LD_PRELOAD"] == "/lib/theirs.so"
    assert proxy.unloaded({})["LD_PRELOAD"] == ""
    # With it, a question to a device would start a server.
    tell = "print(json.dumps({'is_on': proxy.loaded() is not None}))"
    child = f"import json; from mnemosyne_plugin import proxy; {tell}"
    monkeypatch.setattr(probes, "_CHILD", child)
    paths = {"PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **paths, **proxy.preload({})}
    assert probes.ask("torch", 50, environment) == ({"is_on": False}, "")


def test_the_hook_is_set_once_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    assert not autoload.is_on()
    autoload.autoload()
    autoload.autoload()
    assert autoload.is_on()
    assert len(sys.meta_path) == 1


def test_the_proxy_is_asked_without_a_server() -> None:
    client = proxy.installed()
    assert client.unsupported_imports(Path(__file__).parent) == []
    assert (client.state, client.server_pid) == ("off", 0)


# --- the command, for real --------------------------------------------------------


def doctor(
    *options: str, cwd: str | Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in VARIABLES
    }
    return subprocess.run(
        [sys.executable, "-m", "mnemosyne_plugin.cli", "doctor", *options],
        capture_output=True,
        text=True,
        timeout=55,
        cwd=cwd,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", **variables},
    )


def test_the_command_tells_what_is_here_and_that_it_is_protected() -> None:
    ended = doctor()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert lines[0] == "FOUND"
    assert any(re.match(r"torch 2\.\d+\.\S+, .*, covered$", line) for line in lines)
    assert any(line.startswith("our extension loads") for line in lines)
    assert "our hooks loaded by `import torch`" in lines
    assert 'tensors in host memory our backend "mnemosyne", in place of gloo' in lines
    assert "Training by `mnemosyne run` would be protected." in lines


def test_under_the_device_proxy_it_judges_for_it() -> None:
    ended = doctor("--json", **proxy.preload(os.environ))
    data = json.loads(ended.stdout)
    # No GPU is visible.
    assert ended.returncode == cli.EXIT_UNPROTECTED
    assert data["command"] == "mnemosyne run --device-proxy"
    assert data["is_protected"] is False
    assert data["found"]["torch"]["version"]
    assert not any("unknown" in gap["what"] for gap in data["not_protected"])
    assert doctor("--device-proxy", "--json").stdout == ended.stdout


def test_a_torch_that_breaks_or_hangs_ends_with_1_in_time(tmp_path: Path) -> None:
    write(tmp_path / "torch/__init__.py", "raise ImportError('libcudnn is gone')")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    ended = doctor(PYTHONPATH=path)
    assert ended.returncode == cli.EXIT_UNPROTECTED
    assert "! torch cannot be imported: ImportError: libcudnn is gone" in ended.stdout

    write(tmp_path / "torch/__init__.py", "import time; time.sleep(600)")
    ended = doctor("--timeout", "3", PYTHONPATH=path)
    assert ended.returncode == cli.EXIT_UNPROTECTED
    assert "torch cannot be imported: no answer within 3 s" in ended.stdout


def test_an_extension_that_is_not_there_or_crashes_ends_with_1(tmp_path: Path) -> None:
    copy = tmp_path / "mnemosyne_plugin"
    skipped = shutil.ignore_patterns("*.so", "lib", "__pycache__")
    shutil.copytree(ROOT / "mnemosyne_plugin", copy, ignore=skipped)
    ended = doctor("--device-proxy", PYTHONPATH=str(tmp_path), cwd=str(tmp_path))
    assert ended.returncode == cli.EXIT_UNPROTECTED
    assert "! our extension does not load: there is none for this" in ended.stdout
    assert "! the device proxy was not built" in ended.stdout

    extension = copy / "ccl" / f"_C{EXTENSION_SUFFIXES[0]}"
    build_library(extension, "int PyInit__C() { *(volatile int*)0 = 1; return 0; }")
    ended = doctor(PYTHONPATH=str(tmp_path), cwd=str(tmp_path))
    assert ended.returncode == cli.EXIT_UNPROTECTED
    assert re.search(r"  torch +2\.\d", ended.stdout)  # that much is known
    assert "does not load: its process ended by SIGSEGV" in ended.stdout


@pytest.mark.parametrize("options", [["--gpu"], ["here"], ["--timeout", "0"]])
def test_a_wrong_command_line_ends_with_2(options: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["doctor", *options])
    assert raised.value.code == cli.EXIT_USAGE
