"""Questions whose answer may take this process down, or never come.

``ask`` has one answered in a process of its own, within a time limit. There ``answer``
runs, which prints what it finds as it finds it, so that a crash loses only the rest.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from mnemosyne_plugin import autoload, proxy
from mnemosyne_plugin.doctor import installation, machine
from mnemosyne_plugin.doctor.findings import DEVICE_GROUPS
from mnemosyne_plugin.errors import ConfigError

_KILL_S = 1.0  # who does not end by then is in the kernel, and stays
# Whatever changes sys.path, the child finds what we find.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mnemosyne_plugin.doctor import probes; probes.answer(sys.argv[2])"
)
_QUIET = {
    # torch counts GPUs by NVIDIA's library for that, not by CUDA.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

Answers = dict[str, Any]


def ask(
    question: str, timeout_s: float, environment: Mapping[str, str]
) -> tuple[Answers, str]:
    """Return the answers to a question, and why there are no more; "" if all came.

    The child has no device proxy: a question to a device would start a server.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(sys.path), question],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=proxy.unloaded({**environment, **_QUIET}),
    )
    why = ""
    printed, said = b"", b""
    try:
        printed, said = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        why = f"no answer within {timeout_s:.0f} s"
        child.kill()
        with suppress(subprocess.TimeoutExpired):
            printed, said = child.communicate(timeout=_KILL_S)
    code = child.returncode
    if not why and code:
        lines = said.decode(errors="replace").strip().splitlines() or ["nothing said"]
        why = lines[-1]
        if code < 0:
            why = f"its process ended by {signal.Signals(-code).name}"
    answers: Answers = {}
    for line in printed.decode(errors="replace").splitlines():
        with suppress(ValueError):  # torn
            answers |= json.loads(line)
    return answers, why


def answer(question: str) -> None:
    """Print the answers, one JSON object in a line. What libraries print goes away."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        for answers in _QUESTIONS[question]():
            print(json.dumps(answers), file=output, flush=True)


def _torch() -> Iterator[Answers]:
    """torch, then our extension with it: each may be broken in its own way."""
    import torch

    has_nccl = torch.distributed.is_available() and (
        torch.distributed.is_nccl_available()
    )
    yield {
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda or "",
            "nccl": _nccl_version() if has_nccl else None,
            "has_hooks": autoload.is_on(),
        }
    }
    if not installation.has_extension():  # its import would speak of circles
        yield {"extension": {"error": "there is none for this python"}}
        return
    try:
        from mnemosyne_plugin.ccl import devices
    except ImportError as error:
        yield {"extension": {"error": str(error).partition("\n")[0] or "no reason"}}
        return

    def groups(has_proxy: bool) -> Answers:
        variables = dict(os.environ)
        named = variables.get(DEVICE_GROUPS, "")
        if ":" in named:  # somebody else's code
            return {"by": named}
        if has_proxy:  # "nccl" goes without saying; no GPU is visible in this process
            variables.pop(DEVICE_GROUPS, None)
        try:
            found = devices.find_devices(has_proxy, variables)
        except ConfigError as error:
            return {"error": str(error)}
        return {"by": "NCCL" if found else ""}

    yield {
        "extension": {
            "groups": groups(has_proxy=False),
            "groups_with_proxy": groups(has_proxy=True),
        }
    }


def _nccl_version() -> tuple[int, ...]:
    """Return that of the library that torch has loaded: it may be another's build.

    torch's own word, which is the version that it was built with, where it has NCCL in
    itself.
    """
    import torch

    code = ctypes.c_int()
    try:
        nccl = ctypes.CDLL("libnccl.so.2", os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        own: Any = torch.cuda.nccl
        return tuple(own.version()[:3])
    if error := nccl.ncclGetVersion(ctypes.byref(code)):
        raise OSError(f"ncclGetVersion: error {error}")
    unit = 10_000 if code.value >= 10_000 else 1_000  # since 2.9
    return (code.value // unit, code.value % unit // 100, code.value % 100)


def _proxy() -> Iterator[Answers]:
    """Its client, as a library that no device is asked by."""
    client = proxy.installed()
    names = [
        name
        for place in installation.folders("torch")
        for name in client.unsupported_imports(place / "lib")
    ]
    yield {"unsupported": sorted(names)}


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("total", "free", "used")]


def _gpus() -> Iterator[Answers]:
    """The driver's own word, by NVML: it makes no CUDA context."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        if machine.has_gpu_files():
            raise
        yield {"gpus": []}
        return
    nvml.nvmlErrorString.restype = ctypes.c_char_p

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(nvml, name)(*arguments):
            raise OSError(f"{name}: {nvml.nvmlErrorString(code).decode()}")

    def text(name: str, *arguments: Any) -> str:
        room = ctypes.create_string_buffer(96)
        call(name, *arguments, room, len(room))
        return room.value.decode(errors="replace")

    try:
        call("nvmlInit_v2")
    except OSError:
        if machine.has_gpu_files():
            raise
        yield {"gpus": []}
        return
    number = ctypes.c_int()
    call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(number))
    major, minor = divmod(number.value, 1000)
    yield {
        "driver": text("nvmlSystemGetDriverVersion"),
        "driver_cuda": (major, minor // 10),
    }
    call("nvmlDeviceGetCount_v2", ctypes.byref(number))
    gpus = []
    for index in range(number.value):
        gpu, memory = ctypes.c_void_p(), _Memory()
        found: Answers = {}
        try:  # one that is lost must not hide the others
            call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(gpu))
            found["name"] = text("nvmlDeviceGetName", gpu)
            found["uuid"] = text("nvmlDeviceGetUUID", gpu)
            call("nvmlDeviceGetMemoryInfo", gpu, ctypes.byref(memory))
            found["memory_bytes"] = memory.total
        except OSError as error:
            found["error"] = str(error)
        gpus.append(found)
    yield {"gpus": gpus}


_QUESTIONS: dict[str, Callable[[], Iterator[Answers]]] = {
    "torch": _torch,
    "proxy": _proxy,
    "gpus": _gpus,
}
