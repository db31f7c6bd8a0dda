"""Tells what was found and judged: as a text, or as data for another program."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mnemosyne_plugin.doctor import coverage
from mnemosyne_plugin.doctor.coverage import dotted
from mnemosyne_plugin.doctor.findings import Findings, Package
from mnemosyne_plugin.doctor.gaps import gaps, is_protected
from mnemosyne_plugin.doctor.uses import uses

_WIDTH = 100
_NUM_NAMED = 4


def data(findings: Findings) -> dict[str, Any]:
    """Return all of it as plain objects, for JSON."""
    return {
        "command": _command(findings),
        "is_protected": is_protected(findings),
        "found": asdict(findings),
        "used": [asdict(use) for use in uses(findings)],
        "not_protected": [asdict(gap) for gap in gaps(findings)],
    }


def text(findings: Findings) -> str:
    """Return all of it for a reader."""
    found = list(_found(findings))
    used = [(use.purpose, use.means) for use in uses(findings)]
    width = max(len(name) for name, _ in (*found, *used))
    lines = ["FOUND"]
    lines += [line for row in found for line in _row(*row, width)]
    lines += ["", "WILL BE USED"]
    lines += [line for row in used for line in _row(*row, width)]
    lines += ["", "NOT PROTECTED (!: decides)"]
    not_protected = gaps(findings)
    for gap in not_protected:
        lines += _indented("  ! " if gap.is_decisive else "  - ", gap.what)
        lines += _indented("    > ", gap.remedy)
    lines += _indented("  - ", "on any machine: see the table of failures in README.md")
    count = sum(gap.is_decisive for gap in not_protected)
    verdict = f"would not be: {count} to change" if count else "would be protected"
    return "\n".join([*lines, "", f"Training by `{_command(findings)}` {verdict}."])


def _command(findings: Findings) -> str:
    return "mnemosyne run" + (" --device-proxy" if findings.with_proxy else "")


def _row(name: str, value: str, width: int) -> list[str]:
    return _indented(f"  {name:{width}}  ", value)


def _indented(begin: str, value: str) -> list[str]:
    return textwrap.wrap(
        value,
        _WIDTH,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _found(findings: Findings) -> Iterator[tuple[str, str]]:
    yield "mnemosyne", findings.version
    yield "python", findings.python
    yield from _torch(findings)
    yield from _gpus(findings)
    yield "device proxy", _proxy(findings)
    yield from _network(findings)
    yield from _limits(findings)
    if findings.packages is None:
        yield "trainers", _unknown(findings, "packages")
    else:
        found = {package.name: package for package in findings.packages}
        for name in coverage.PACKAGES:
            yield name, _package(found.get(name))
    for name, value in findings.environment.items():
        yield name, value or '""'


def _torch(findings: Findings) -> Iterator[tuple[str, str]]:
    torch, extension = findings.torch, findings.extension
    if torch is None:
        yield "torch", _unknown(findings, "torch")
        return
    cuda = f"CUDA {torch.cuda}" if torch.cuda else "without CUDA"
    is_covered = coverage.TORCH.cover(torch.version)
    yield "torch", f"{torch.version}, {cuda}, {_covered(is_covered)}"
    built_for = f", built for torch {findings.built_for}" if findings.built_for else ""
    if extension is None:
        yield "our extension", _unknown(findings, "extension")
    elif extension.error:
        yield "our extension", f"does not load{built_for}: {extension.error}"
    else:
        yield "our extension", f"loads{built_for}"
    hooks = "loaded" if torch.has_hooks else "not loaded"
    yield "our hooks", f"{hooks} by `import torch`"
    if torch.nccl is None:
        yield "NCCL", "none in this torch"
    else:
        abilities = [
            f"{name}: {'yes' if torch.nccl >= since else 'no'}"
            for name, since in coverage.NCCL.items()
        ]
        yield "NCCL", f"{dotted(torch.nccl)}; {', '.join(abilities)}"


def _gpus(findings: Findings) -> Iterator[tuple[str, str]]:
    gpus = findings.gpus
    if gpus is None:
        yield "GPUs", _unknown(findings, "gpus")
        return
    if gpus.driver:
        cuda = f", CUDA {dotted(gpus.driver_cuda)}" if gpus.driver_cuda else ""
        yield "NVIDIA's driver", f"{gpus.driver}{cuda}"
    if not gpus.gpus:
        yield "GPUs", "none"
    for index, gpu in enumerate(gpus.gpus):
        memory = _gib(gpu.memory_bytes)
        yield f"GPU {index}", ", ".join(filter(None, [gpu.name, memory, gpu.error]))


def _proxy(findings: Findings) -> str:
    proxy = findings.proxy
    if proxy is None:
        return _unknown(findings, "proxy")
    if proxy.error:
        return "not built"
    if proxy.unsupported is None:
        return f"built; what it does not support: {_unknown(findings, 'proxy')}"
    if findings.torch is not None and not findings.torch.cuda:
        return "built"
    names = ", ".join(proxy.unsupported[:_NUM_NAMED])
    return (
        f"built; torch imports {len(proxy.unsupported)} functions that it does not "
        f"support: {names}, ..."
    )


def _network(findings: Findings) -> Iterator[tuple[str, str]]:
    if findings.interfaces is None:
        yield "network", _unknown(findings, "interfaces")
    elif not findings.interfaces:
        yield "network", "no interface with an address but the loopback"
    for each in findings.interfaces or ():
        speed = f"{each.speed_mbit} Mbit/s" if each.speed_mbit else "speed unknown"
        yield f"network {each.name}", ", ".join([*each.addresses, speed])
    if findings.rdma is None:
        yield "InfiniBand, RoCE", _unknown(findings, "rdma")
    elif not findings.rdma:
        yield "InfiniBand, RoCE", "none"
    for port in findings.rdma or ():
        yield f"{port.kind} {port.name}", f"{port.rate}, {port.state}; for NCCL alone"


def _limits(findings: Findings) -> Iterator[tuple[str, str]]:
    limits = findings.limits
    if limits is None:
        yield "limits", _unknown(findings, "limits")
        return
    soft, hard = (str(n) if n >= 0 else "no limit" for n in limits.open_files)
    yield "open files", soft if soft == hard else f"{soft}, at most {hard}"
    if findings.rdma:
        soft_bytes = limits.locked_bytes[0]
        locked = f"{soft_bytes >> 10} KiB" if soft_bytes >= 0 else "no limit"
        yield "locked memory", locked
    if findings.gpus is None or findings.gpus.gpus:
        yield "/dev/shm", _gib(limits.shm_bytes) or "not there"


def _package(package: Package | None) -> str:
    if package is None:
        return "not found"
    if package.is_other:
        return f"not NVIDIA's: {package.version} of another project"
    versions = coverage.PACKAGES[package.name]
    patched = ", patched" if package.is_patched else ""
    known = _covered(versions.cover(package.version)) if versions else "not tried"
    return f"{package.version or 'version unknown'}{patched}, {known}"


def _covered(is_covered: bool) -> str:
    return "covered" if is_covered else "not covered"


def _unknown(findings: Findings, name: str) -> str:
    return f"unknown: {findings.why_not(name)}"


def _gib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"
