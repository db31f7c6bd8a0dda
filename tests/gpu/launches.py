"""Launches that are more than a grid and its arguments, in two servers.

    python tests/gpu/launches.py

MNEMOSYNE_GPU_KERNELS names the library of kernels.cu.
"""

import ctypes
import os

import torch
from servers import end_server

from mnemosyne_plugin import proxy

COUNT = 20_000
SHARED = 25_000  # 100,000 bytes; 48 KiB need no permission


def empty(count: int) -> torch.Tensor:
    """Return room for so many numbers on the device."""
    return torch.full((count,), -1, dtype=torch.int32, device="cuda")


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return where it lies."""
    return ctypes.c_void_p(tensor.data_ptr())


def check(error: int, what: str, is_right: bool) -> None:
    """Print how a launch went; it must have gone well."""
    print(what, "error", error, "right" if is_right else "WRONG")
    assert error == 0 and is_right


def launch_all(kernels: ctypes.CDLL) -> None:
    """Launch each, and look at what it has computed."""
    expected = torch.arange(COUNT, dtype=torch.int32)
    to = empty(7500)
    error = kernels.launchLarge(at(to))
    check(
        error, "30000_bytes_of_parameters", torch.equal(to.cpu(), 3 * expected[:7500])
    )
    to = empty(8)
    error = kernels.launchClustered(at(to), 8, 2)
    check(error, "clusters", to.tolist() == [200, 201] * 4)
    to = empty(SHARED)
    error = kernels.launchReverse(at(to), SHARED)
    reverse = torch.arange(SHARED - 1, -1, -1, dtype=torch.int32)
    check(error, "100000_bytes_of_shared_memory", torch.equal(to.cpu(), reverse))
    values, to = empty(COUNT), empty(COUNT)
    error = kernels.launchDependent(at(values), at(to), COUNT)
    check(error, "dependent_launch", torch.equal(to.cpu(), expected + 1))


def main() -> None:
    """Launch all, and once more behind the end of the server."""
    device = proxy.loaded()
    assert device is not None
    kernels = ctypes.CDLL(os.environ["MNEMOSYNE_GPU_KERNELS"])
    torch.zeros(1, device="cuda")
    assert kernels.allowShared(4 * SHARED) == 0
    launch_all(kernels)
    end_server(device)
    device.recover(60)
    launch_all(kernels)


if __name__ == "__main__":
    main()
