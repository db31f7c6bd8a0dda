"""What would not survive, and what to change: pure, from findings alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from mnemosyne_plugin.doctor import coverage
from mnemosyne_plugin.doctor.coverage import dotted
from mnemosyne_plugin.doctor.findings import (
    AUTOLOAD,
    DEVICE_GROUPS,
    TORCHCOMMS,
    DeviceGroups,
    Findings,
    Package,
)

_SOME_FILES = 1024
_SOME_SHM = 1 << 30  # what containers have is 64 MiB
_INSTALL_AGAIN = "install mnemosyne-plugin again, for this python (README, Quickstart)"
_INSTALL_TORCH = f"install torch {coverage.TORCH}, then mnemosyne-plugin again"

_PROTECT_GPUS = (
    "start jobs by `mnemosyne run --device-proxy` (docs/proxy.md), or with "
    "MNEMOSYNE_DEVICE_GROUPS=nccl (docs/design.md); neither has met a GPU yet"
)


@dataclass(frozen=True, slots=True)
class Gap:
    """Something that is not protected."""

    what: str
    remedy: str
    is_decisive: bool = True
    """Jobs here would not be protected; False: mind it, and go on."""


def is_protected(findings: Findings) -> bool:
    """Whether training that is started by `mnemosyne run` here would be."""
    return not any(gap.is_decisive for gap in gaps(findings))


def gaps(findings: Findings) -> list[Gap]:
    """Return what is not protected, the decisive ones first."""
    found = [
        *_of_torch(findings),
        *(of_proxy(findings) if findings.with_proxy else _of_gpus(findings)),
        *_of_driver(findings),
        *_of_trainers(findings),
        *_of_machine(findings),
    ]
    return sorted(found, key=lambda gap: not gap.is_decisive)


def _of_torch(findings: Findings) -> Iterator[Gap]:
    torch, extension = findings.torch, findings.extension
    if torch is None:
        why = findings.why_not("torch")
        yield Gap(f"torch cannot be imported: {why}", _INSTALL_TORCH)
        return
    if not coverage.TORCH.cover(torch.version):
        yield Gap(
            f"torch {torch.version} is not covered, only {coverage.TORCH}",
            _INSTALL_TORCH,
        )
    built_for = coverage.parse(findings.built_for)
    if built_for and built_for != coverage.parse(torch.version):
        yield Gap(
            f"our extension was built for torch {findings.built_for}, not for this one",
            _INSTALL_AGAIN,
        )
    if extension is None:
        why = findings.why_not("extension")
        yield Gap(f"our extension does not load: {why}", _INSTALL_AGAIN)
    elif extension.error:
        yield Gap(f"our extension does not load: {extension.error}", _INSTALL_AGAIN)
    torchcomms = findings.environment.get(TORCHCOMMS, "0")
    if torchcomms.lower() not in ("", "0", "false"):
        yield Gap(
            "TORCH_DISTRIBUTED_USE_TORCHCOMMS puts torchcomms in our backend's place",
            "unset it",
        )


def _of_gpus(findings: Findings) -> Iterator[Gap]:
    """What moves tensors on GPUs without the device proxy."""
    torch, groups = findings.torch, findings.device_groups(with_proxy=False)
    if groups is not None and groups.error:
        yield Gap(
            f"workers would end at their start: {groups.error}",
            f"unset {DEVICE_GROUPS}, or run this where the GPUs are",
        )
        return
    if findings.gpus is None and torch is not None and torch.cuda:
        why = findings.why_not("gpus")
        yield Gap(
            f"whether there are GPUs cannot be told: {why}",
            "see whether nvidia-smi answers",
        )
        return
    if not findings.visible_gpus or torch is None:
        return
    if not torch.cuda:
        yield Gap(
            "the GPUs are not used: this torch is built without CUDA",
            "install torch's build for CUDA, if they should be",
            is_decisive=False,
        )
        return
    if groups is None:  # told above
        return
    if not groups.by:
        yield Gap("nothing protects tensors on GPUs: NCCL is refused", _PROTECT_GPUS)
    else:
        yield Gap(
            "a GPU fault ends its worker",
            "--device-proxy keeps the worker",
            is_decisive=False,
        )
        yield from _of_nccl(findings, groups)


def of_proxy(findings: Findings) -> Iterator[Gap]:
    """What is in the way of a device behind the proxy."""
    torch, proxy = findings.torch, findings.proxy
    if proxy is None:
        why = findings.why_not("proxy")
        yield Gap(f"the device proxy cannot be looked at: {why}", _INSTALL_AGAIN)
        return
    if proxy.error:
        yield Gap("the device proxy was not built", _INSTALL_AGAIN)
    elif proxy.unsupported is None:  # and LD_PRELOAD passes over it
        why = findings.why_not("proxy")
        yield Gap(f"the device proxy does not load: {why}", _INSTALL_AGAIN)
    if torch is not None and not torch.cuda:
        yield Gap(
            "the device proxy has nothing to serve: this torch is built without CUDA",
            f"install torch's build for CUDA {coverage.PROXY_CUDA}, or leave out "
            "--device-proxy",
        )
    elif torch is not None and coverage.parse(torch.cuda)[0] != coverage.PROXY_CUDA:
        yield Gap(
            f"the device proxy speaks CUDA {coverage.PROXY_CUDA}, and this torch CUDA "
            f"{torch.cuda}",
            f"install torch's build for CUDA {coverage.PROXY_CUDA}",
        )
    elif torch is not None and torch.nccl is None:
        yield Gap("this torch has no NCCL", "install a build of torch that has it")
    if not findings.visible_gpus and not findings.has_emulated_device:
        why = findings.unknown.get("gpus", "none is seen")
        yield Gap(
            f"the device proxy has no GPU: {why}",
            "run this where the GPUs are, or leave out --device-proxy",
        )
    groups = findings.device_groups(with_proxy=True)
    if groups is not None and groups.by:
        yield from _of_nccl(findings, groups)
    if findings.with_proxy:
        yield Gap(
            "refused with the device proxy: DeepSpeed's pipelines, experts, offload "
            "and ZeRO 3, and Megatron-LM's `pretrain`",
            "leave out --device-proxy for these (docs/proxy.md)",
            is_decisive=False,
        )


def _of_nccl(findings: Findings, groups: DeviceGroups) -> Iterator[Gap]:
    nccl = findings.torch.nccl if findings.torch is not None else None
    since = coverage.NCCL[coverage.NON_BLOCKING]
    if groups.by == "NCCL" and nccl is not None and nccl < since:
        yield Gap(
            f"NCCL {dotted(nccl)} has no {coverage.NON_BLOCKING}: what it has begun "
            "cannot be ended",
            f"install NCCL {dotted(since)} or newer",
        )


def _of_driver(findings: Findings) -> Iterator[Gap]:
    torch, gpus = findings.torch, findings.gpus
    if torch is None or not torch.cuda or gpus is None or not findings.visible_gpus:
        return
    wanted = coverage.parse(torch.cuda)
    if gpus.driver_cuda is not None and gpus.driver_cuda[0] < wanted[0]:
        yield Gap(
            f"driver {gpus.driver} serves CUDA {dotted(gpus.driver_cuda)}, and this "
            f"torch is built for {torch.cuda}",
            "install a newer driver, or a torch for that CUDA",
        )
    for index, gpu in enumerate(gpus.gpus):
        if gpu.error:
            yield Gap(
                f"GPU {index} does not answer: {gpu.error}",
                "reset it, or leave it out of CUDA_VISIBLE_DEVICES",
                is_decisive=False,
            )


def _of_trainers(findings: Findings) -> Iterator[Gap]:
    if findings.packages is None:
        why = findings.why_not("packages")
        yield Gap(f"which trainers there are cannot be told: {why}", _INSTALL_AGAIN)
    for package in findings.packages or ():
        if package.is_other:
            yield Gap(
                f"the installed apex {package.version} is not NVIDIA's, but another "
                "project of that name",
                "pip uninstall apex, and build NVIDIA's from its sources",
                is_decisive=False,
            )
            continue
        versions = coverage.PACKAGES[package.name]
        if versions is not None and not versions.cover(package.version):
            yield Gap(
                f"{package.name} {package.version or 'of an unknown version'} is not "
                f"covered, only {versions}",
                "install one of these",
            )
        if package.name == "Transformer Engine":
            yield Gap(
                "FP8 and FP4 training with Transformer Engine is refused at start",
                "train in bf16 (docs/megatron.md)",
                is_decisive=False,
            )
    yield from _of_hooks(findings)


def _of_hooks(findings: Findings) -> Iterator[Gap]:
    if findings.torch is None or findings.torch.has_hooks:
        return

    def needs_hooks(package: Package) -> bool:
        return package.name in coverage.HOOKED and not package.is_patched

    names = [each.name for each in findings.packages or () if needs_hooks(each)]
    is_off = findings.environment.get(AUTOLOAD) == "0"
    yield Gap(
        "`import torch` does not load our hooks: "
        f"{' and '.join(names) or 'DeepSpeed or Megatron-LM'} would run without us",
        "unset TORCH_DEVICE_BACKEND_AUTOLOAD"
        if is_off
        else "install mnemosyne-plugin with pip for this python; PYTHONPATH is not "
        "enough",
        is_decisive=bool(names),
    )


def _of_machine(findings: Findings) -> Iterator[Gap]:
    limits = findings.limits
    if limits is None:
        return
    soft, hard = limits.open_files
    if 0 <= soft < _SOME_FILES:
        yield Gap(
            f"a worker may open {soft} files: links to other workers take one each",
            f"ulimit -n {max(hard, _SOME_FILES)}",
            is_decisive=False,
        )
    has_gpus = bool(findings.visible_gpus)
    if has_gpus and limits.shm_bytes is not None and limits.shm_bytes < _SOME_SHM:
        yield Gap(
            f"/dev/shm has {limits.shm_bytes >> 20} MiB: NCCL and loaders' workers may "
            "fail in it",
            "give it some GiB (docker run --shm-size)",
            is_decisive=False,
        )
    if has_gpus and findings.rdma and limits.locked_bytes[0] >= 0:
        yield Gap(
            f"a worker may lock {limits.locked_bytes[0] >> 10} KiB: NCCL may fail over "
            "InfiniBand",
            "ulimit -l unlimited",
            is_decisive=False,
        )
