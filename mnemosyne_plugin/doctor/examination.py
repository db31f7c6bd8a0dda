"""Looks at this machine and installation. Nothing that is broken stops it."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mnemosyne_plugin import __version__, proxy
from mnemosyne_plugin.doctor import installation, machine
from mnemosyne_plugin.doctor.findings import (
    VARIABLES,
    DeviceGroups,
    Extension,
    Findings,
    Gpu,
    Gpus,
    Proxy,
    Torch,
)
from mnemosyne_plugin.doctor.probes import Answers, ask
from mnemosyne_plugin.errors import ConfigError

# The first import of torch may come from a slow network's disk.
_TIMEOUTS_S = {"torch": 120.0, "proxy": 30.0, "gpus": 20.0}

T = TypeVar("T")


def examine(
    with_proxy: bool = False,
    timeout_s: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Findings:
    """Return what can be found out. Needs no device, and comes back in any case.

    with_proxy: judge as for `mnemosyne run --device-proxy`. timeout_s: the longest wait
    for each of what may not answer; None: as long as a healthy one could take.
    """
    unknown: dict[str, str] = {}

    def find(name: str, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except Exception as error:  # of whatever is broken here: told, not raised
            unknown[name] = f"{type(error).__name__}: {error}"
            return None

    def asked(question: str) -> Answers:
        limit_s = timeout_s or _TIMEOUTS_S[question]
        got = find(question, lambda: ask(question, limit_s, environment))
        if got is None:
            return {}
        answers, why = got
        if why:
            unknown[question] = why
        return answers

    of_torch = asked("torch")
    torch = find("torch", lambda: _torch(of_torch))
    if torch is not None and "torch" in unknown:  # what came behind it is missing
        unknown["extension"] = unknown.pop("torch")
    return Findings(
        version=__version__,
        python=f"{sys.version.split()[0]}, {sys.executable}",
        with_proxy=with_proxy or proxy.loaded() is not None,
        torch=torch,
        extension=find("extension", lambda: _extension(of_torch)),
        built_for=find("built_for", installation.torch_built_for) or "",
        gpus=find("gpus", lambda: _gpus(asked("gpus"))),
        proxy=find("proxy", lambda: _proxy(asked)),
        interfaces=find("interfaces", machine.interfaces),
        rdma=find("rdma", machine.rdma_ports),
        limits=find("limits", machine.limits),
        packages=find("packages", installation.packages),
        environment={n: environment[n] for n in VARIABLES if n in environment},
        unknown=unknown,
    )


def _torch(answers: Answers) -> Torch | None:
    if "torch" not in answers:
        return None
    found: dict[str, Any] = answers["torch"]
    nccl = found.pop("nccl")
    return Torch(**found, nccl=tuple(nccl) if nccl else None)


def _extension(answers: Answers) -> Extension | None:
    if "extension" not in answers:
        return None
    found: dict[str, Any] = answers["extension"]
    if "error" in found:
        return Extension(error=found["error"])
    return Extension(
        groups=DeviceGroups(**found["groups"]),
        groups_with_proxy=DeviceGroups(**found["groups_with_proxy"]),
    )


def _gpus(answers: Answers) -> Gpus | None:
    if "gpus" not in answers:
        return None
    cuda = answers.get("driver_cuda")
    return Gpus(
        driver=answers.get("driver", ""),
        driver_cuda=(cuda[0], cuda[1]) if cuda else None,
        gpus=tuple(Gpu(**found) for found in answers["gpus"]),
    )


def _proxy(asked: Callable[[str], Answers]) -> Proxy:
    try:
        proxy.preload({})
    except ConfigError as error:
        return Proxy(error=str(error))
    names = asked("proxy").get("unsupported")
    return Proxy(unsupported=None if names is None else tuple(names))
