"""What the kernel tells of this machine: network, limits. No call that may wait."""

import fcntl
import ipaddress
import os
import resource
import socket
import struct
from contextlib import suppress
from pathlib import Path

from mnemosyne_plugin.doctor.findings import Interface, Limits, RdmaPort

_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24x")  # struct ifreq: a name, then an address
_LOOPBACK = 0x8  # IFF_LOOPBACK


def interfaces(folder: Path = Path("/sys/class/net")) -> tuple[Interface, ...]:
    """Return the network interfaces that are up and have an address."""
    found = []
    by_name = _ipv6_addresses()
    for path in sorted(folder.iterdir()):
        if int(_read(path / "flags") or "0", 16) & _LOOPBACK:
            continue
        addresses = (*_ipv4_addresses(path.name), *by_name.get(path.name, ()))
        if not addresses or _read(path / "operstate") == "down":
            continue
        speed = _read(path / "speed")  # -1 where the driver does not know
        found.append(
            Interface(
                name=path.name,
                addresses=addresses,
                speed_mbit=int(speed) if speed.isdecimal() else None,
            )
        )
    return tuple(found)


def rdma_ports(folder: Path = Path("/sys/class/infiniband")) -> tuple[RdmaPort, ...]:
    """Return the ports of InfiniBand and RoCE devices."""
    return tuple(
        RdmaPort(
            name=f"{path.parent.parent.name}:{path.name}",
            kind="RoCE" if _read(path / "link_layer") == "Ethernet" else "InfiniBand",
            rate=_read(path / "rate") or "rate unknown",
            state=_read(path / "state").rpartition(" ")[2] or "state unknown",
        )
        for path in sorted(folder.glob("*/ports/*"))
    )


def limits() -> Limits:
    """Return the limits that a worker would have."""
    shm_bytes = None
    with suppress(FileNotFoundError):
        status = os.statvfs("/dev/shm")
        shm_bytes = status.f_blocks * status.f_frsize
    return Limits(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK),
        shm_bytes=shm_bytes,
    )


def has_gpu_files() -> bool:
    """Whether the kernel's driver of NVIDIA has GPUs, as its device files tell."""
    return any(name.name[6:].isdecimal() for name in Path("/dev").glob("nvidia[0-9]*"))


def _ipv4_addresses(name: str) -> tuple[str, ...]:
    request = _IFREQ.pack(name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, _SIOCGIFADDR, request)
        except OSError:  # it has none
            return ()
    return (socket.inet_ntoa(answer[20:24]),)


def _ipv6_addresses() -> dict[str, tuple[str, ...]]:
    """Return those that other nodes can use, by interface."""
    found: dict[str, tuple[str, ...]] = {}
    for line in _read(Path("/proc/net/if_inet6")).splitlines():
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(int(digits, 16))
        if not address.is_link_local:
            found[name] = (*found.get(name, ()), str(address))
    return found


def _read(path: Path) -> str:
    """Return a file of the kernel's; "" if it has nothing to say."""
    with suppress(OSError):
        return path.read_text().strip()
    return ""
