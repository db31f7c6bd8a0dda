"""Faults that kernels make, and what the next server takes to its first results.

    python tests/gpu/faults.py

MNEMOSYNE_GPU_KERNELS names the library of kernels.cu; without it only torch's own
assertion fails.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from servers import wait_until_lost

from mnemosyne_plugin import proxy

HANG_S = 1.0
UNMAPPED = 0x60F000000000  # in the proxy's range, where nothing lies


def milliseconds(function: Callable[[], object]) -> float:
    """Return what it takes, with all that it leaves to the device."""
    began = time.monotonic()
    function()
    torch.cuda.synchronize()
    return (time.monotonic() - began) * 1e3


def index_out_of_range() -> None:
    """Have an assertion of torch's fail."""
    places = torch.tensor([1_000_000], device="cuda")
    torch.zeros(4, device="cuda")[places]


def faults(device: proxy.DeviceProxy) -> dict[str, Callable[[], object]]:
    """Return functions that lose the device, by their names."""
    found: dict[str, Callable[[], object]] = {"index_assert": index_out_of_range}
    path = os.environ.get("MNEMOSYNE_GPU_KERNELS", "")
    if not Path(path).is_file():
        return found
    kernels = ctypes.CDLL(path)
    stop = torch.zeros(1, dtype=torch.int32, device="cuda")

    def endless() -> None:
        stop.zero_()
        torch.cuda.synchronize()
        threading.Timer(HANG_S, device.kill).start()
        kernels.launchEndless(ctypes.c_void_p(stop.data_ptr()))

    found["illegal_address"] = lambda: kernels.launchWild(ctypes.c_uint64(UNMAPPED))
    found["assert"] = kernels.launchFailing
    found["endless"] = endless
    return found


def main() -> None:
    """Lose the device by each of them."""
    device = proxy.loaded()
    assert device is not None
    x = torch.ones(512, 512, device="cuda")
    started = [milliseconds(lambda: x + 1), milliseconds(lambda: x @ x)]
    print("start first_kernel_ms first_matmul_ms", *(f"{ms:.1f}" for ms in started))
    for name, fault in faults(device).items():
        began = time.monotonic()
        try:
            fault()
            torch.cuda.synchronize()
            raise AssertionError(f"{name} was no fault")
        except RuntimeError as error:
            text = str(error).splitlines()[0]
        lost_ms = (time.monotonic() - began) * 1e3
        wait_until_lost(device)  # an error is told a little before
        print(f"# {name}: {text}; {device.describe_loss()}")
        recover_ms = milliseconds(lambda: device.recover(60))
        x.fill_(1)
        kernel_ms = milliseconds(lambda: x + 1)
        matmul_ms = milliseconds(lambda: x @ x)
        again_ms = milliseconds(lambda: x @ x)
        assert float((x @ x)[3, 5]) == 512
        all_ms = (lost_ms, recover_ms, kernel_ms, matmul_ms, again_ms)
        print(f"fault_{name}", *(f"{ms:.1f}" for ms in all_ms))


if __name__ == "__main__":
    main()
