"""What a job here would use: pure, from findings alone."""

from dataclasses import dataclass

from mnemosyne_plugin.doctor.coverage import dotted
from mnemosyne_plugin.doctor.findings import DeviceGroups, Findings
from mnemosyne_plugin.doctor.gaps import of_proxy


@dataclass(frozen=True, slots=True)
class Use:
    """What a job would use for something."""

    purpose: str
    means: str


def uses(findings: Findings) -> list[Use]:
    """Return what a job here would use."""
    extension = findings.extension
    is_loaded = extension is not None and not extension.error
    addresses = [
        f"{each.name} {each.addresses[0]}" for each in findings.interfaces or ()
    ]
    return [
        Use(
            "tensors in host memory",
            'our backend "mnemosyne", in place of gloo'
            if is_loaded
            else "nothing: our extension does not load",
        ),
        Use("tensors on GPUs", _means(findings)),
        Use("with --device-proxy", _means_with_proxy(findings)),
        Use(
            "transport in a node",
            "shared memory without a file in /dev/shm, else TCP (--transport tcp: "
            "always)",
        ),
        Use(
            "transport between nodes",
            "TCP, from the address on the way to the leader; --local-addr takes "
            f"another ({', '.join(addresses) or 'no address found'})",
        ),
    ]


def _means(findings: Findings) -> str:
    torch = findings.torch
    if torch is not None and not torch.cuda:
        return "nothing: this torch is built without CUDA"
    groups = findings.device_groups(with_proxy=False)
    if groups is None or groups.error:
        return f"nothing: {groups.error if groups else 'our extension does not load'}"
    if groups.by:
        return f"{_nccl_name(findings, groups)}, held by our groups, in the worker"
    return "nothing: a script that asks for NCCL is refused"


def _means_with_proxy(findings: Findings) -> str:
    obstacles = list(of_proxy(findings))
    if obstacles and obstacles[0].is_decisive:
        return f"nothing: {obstacles[0].what}"
    groups = findings.device_groups(with_proxy=True)
    if groups is None:
        return "nothing: our extension does not load"
    device = "the emulated device" if findings.has_emulated_device else "the GPU"
    return (
        f"{_nccl_name(findings, groups)}, held by our groups, in a process of its own "
        f"that has {device}"
    )


def _nccl_name(findings: Findings, groups: DeviceGroups) -> str:
    if groups.by != "NCCL" or findings.torch is None or findings.torch.nccl is None:
        return groups.by
    return f"NCCL {dotted(findings.torch.nccl)}"
