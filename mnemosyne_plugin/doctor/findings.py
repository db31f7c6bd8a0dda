"""What was found on this machine: plain data, made by ``examination``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICE_GROUPS = "MNEMOSYNE_DEVICE_GROUPS"
EMULATED = "MNEMOSYNE_PROXY_DEVICE"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
TORCHCOMMS = "TORCH_DISTRIBUTED_USE_TORCHCOMMS"
VARIABLES = (VISIBLE, DEVICE_GROUPS, EMULATED, AUTOLOAD, TORCHCOMMS)
"""What else decides; workers inherit them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceGroups:
    """What would move the tensors of groups that lie on devices."""

    by: str = ""
    """"" for nothing."""
    error: str = ""
    """Why a worker would end at its start; "" if it would not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Torch:
    """The torch that workers would import."""

    version: str
    cuda: str = ""
    """That it was built for; "" for none."""
    nccl: tuple[int, ...] | None = None
    has_hooks: bool = False
    """Whether its import sets ours, which protect trainers by their config alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """Our compiled extension, loaded with that torch."""

    error: str = ""
    """Why it does not load; "" if it does."""
    groups: DeviceGroups = DeviceGroups()
    groups_with_proxy: DeviceGroups = DeviceGroups()


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One that NVIDIA's driver tells of."""

    name: str = ""
    uuid: str = ""
    memory_bytes: int | None = None
    error: str = ""
    """Why the driver could not tell all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """All of this machine, in the driver's order."""

    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    """The newest CUDA that the driver serves."""
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """A network interface that is up, but the loopback."""

    name: str
    addresses: tuple[str, ...] = ()
    speed_mbit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RdmaPort:
    """A port of an InfiniBand or RoCE device."""

    name: str
    kind: str
    rate: str
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Soft and hard, as ``resource`` gives them: -1 is no limit."""

    open_files: tuple[int, int]
    locked_bytes: tuple[int, int]
    shm_bytes: int | None
    """The size of /dev/shm; None if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A trainer, or what it computes with, that ``import`` would find."""

    name: str
    """A key of ``coverage.PACKAGES``."""
    version: str = ""
    """"" if it does not say."""
    is_other: bool = False
    """It only has the name: another project's."""
    is_patched: bool = False
    """It has our hooks in its source tree (patches/)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """The device proxy of this installation."""

    error: str = ""
    """Why it is not there."""
    unsupported: tuple[str, ...] | None = None
    """What this torch imports and would not get; None if it could not be asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All of it. None: it could not be found out, and ``unknown`` says why."""

    version: str
    python: str
    with_proxy: bool = False
    """Whether jobs would have the device proxy: by an option, or by LD_PRELOAD."""
    torch: Torch | None = None
    extension: Extension | None = None
    built_for: str = ""
    """The torch that the extension was built for; "" if nothing says so."""
    gpus: Gpus | None = None
    proxy: Proxy | None = None
    interfaces: tuple[Interface, ...] | None = None
    rdma: tuple[RdmaPort, ...] | None = None
    limits: Limits | None = None
    packages: tuple[Package, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Those of ``VARIABLES`` that are set."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Why a field is None, by its name."""

    @property
    def visible_gpus(self) -> tuple[Gpu, ...]:
        """Those that CUDA_VISIBLE_DEVICES leaves."""
        gpus = self.gpus.gpus if self.gpus is not None else ()
        named = self.environment.get(VISIBLE)
        if named is None or "MIG-" in named:
            return gpus
        visible: list[Gpu] = []
        for name in map(str.strip, named.split(",")):
            if name.isdecimal() and int(name) < len(gpus):
                visible.append(gpus[int(name)])
            elif name.startswith("GPU-"):
                visible += [gpu for gpu in gpus if gpu.uuid.startswith(name)]
            else:  # CUDA stops at the first that it does not know
                break
        return tuple(visible)

    @property
    def has_emulated_device(self) -> bool:
        """Whether the device proxy would serve none of the GPUs, but a made-up one."""
        return self.environment.get(EMULATED) == "emulated"

    def device_groups(self, with_proxy: bool) -> DeviceGroups | None:
        """Return what moves tensors on devices; None if our extension does not load."""
        if self.extension is None or self.extension.error:
            return None
        each = self.extension
        return each.groups_with_proxy if with_proxy else each.groups

    def why_not(self, name: str) -> str:
        """Return why a field is None."""
        return self.unknown.get(name, "no reason is known")
