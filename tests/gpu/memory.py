"""Addresses and times of device memory, through the proxy's client alone.

python tests/gpu/memory.py addresses
python tests/gpu/memory.py most
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable

from servers import end_server

from mnemosyne_plugin import proxy

MiB = 1 << 20
IS_EMULATED = os.environ.get("MNEMOSYNE_PROXY_DEVICE") == "emulated"
PIECE = 64 * MiB if IS_EMULATED else 1024 * MiB
SIZES = (1, 3 * MiB, 2 * MiB, 700, 20 * MiB, 512 * MiB, 2 * MiB + 1)

process = ctypes.CDLL(None)


def call(name: str, *arguments: object) -> None:
    """Call a function of the runtime, which must succeed."""
    error = getattr(process, name)(*arguments)
    assert error == 0, f"{name} gives error {error}"


def allocate(size: int) -> int:
    """Return the address of so many bytes."""
    address = ctypes.c_void_p()
    call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
    assert address.value is not None
    return address.value


def fill(address: int, value: int, size: int) -> None:
    """Have the device fill memory."""
    at = ctypes.c_void_p(address)
    call("cudaMemset", at, ctypes.c_int(value), ctypes.c_size_t(size))


def fill_all(places: list[int]) -> None:
    """Have the device write to all pieces, and wait for it."""
    for place in places:
        fill(place, 1, PIECE)
    call("cudaDeviceSynchronize")


def first_and_last(address: int, size: int) -> bytes:
    """Return the first and the last byte of an allocation."""
    read = ctypes.create_string_buffer(2)
    for at, to in ((address, 0), (address + size - 1, 1)):
        target = ctypes.byref(read, to)
        source = ctypes.c_void_p(at)
        call("cudaMemcpy", target, source, ctypes.c_size_t(1), ctypes.c_int(2))
    return read.raw


def free_bytes() -> int:
    """Return how much memory is left."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value


def timed(name: str, function: Callable[[], object]) -> None:
    """Do something, and print what it took."""
    began = time.monotonic()
    function()
    print(name, f"{(time.monotonic() - began) * 1e3:.1f}")


def addresses(device: proxy.DeviceProxy) -> None:
    """Find allocations where they were, full of NaN, behind a server's end."""
    places = [allocate(size) for size in SIZES]
    for address, size in zip(places, SIZES, strict=True):
        fill(address, 7, size)
    timed("end_ms", lambda: end_server(device))
    timed("recover_ms", lambda: device.recover(60))
    for address, size in zip(places, SIZES, strict=True):
        assert first_and_last(address, size) == b"\xff\xff", hex(address)
        fill(address, 9, size)
        assert first_and_last(address, size) == b"\x09\x09", hex(address)
    places.append(allocate(5))
    print("addresses", *map(hex, places))


class Nvml:
    """What all processes together use of the first GPU."""

    class Memory(ctypes.Structure):
        """nvmlMemory_t."""

        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self) -> None:
        self._c = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        assert self._c.nvmlInit_v2() == 0
        get = self._c.nvmlDeviceGetHandleByIndex_v2
        assert get(0, ctypes.byref(self._device)) == 0

    def used_bytes(self) -> int:
        """Return it."""
        memory = self.Memory()
        assert self._c.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)) == 0
        return memory.used


def most(device: proxy.DeviceProxy) -> None:
    """Take nearly all memory, and lose it twice."""
    nvml = None if IS_EMULATED else Nvml()
    before = nvml.used_bytes() if nvml is not None else 0
    allocate(1)
    count = int(free_bytes() * 0.93) // PIECE
    places: list[int] = []
    print("gib", count * PIECE / 2**30)
    timed("map_ms", lambda: places.extend(allocate(PIECE) for _ in range(count)))
    timed("fill_ms", lambda: fill_all(places))
    timed(
        "unmap_ms",
        lambda: [call("cudaFree", ctypes.c_void_p(place)) for place in places],
    )
    again = [allocate(PIECE) for _ in range(count)]
    assert again == places
    timed("end_ms", lambda: end_server(device))
    began = time.monotonic()
    while nvml is not None and nvml.used_bytes() > before + 256 * MiB:
        assert time.monotonic() - began < 30, "the memory does not come back"
    print("free_behind_end_ms", f"{(time.monotonic() - began) * 1e3:.1f}")
    timed("recover_ms", lambda: device.recover(60))
    # As it happens in a job: nobody looks at whether the memory is free.
    timed("end_and_recover_ms", lambda: (end_server(device), device.recover(60)))
    assert first_and_last(places[-1], PIECE) == b"\xff\xff"


def main() -> None:
    """Do what the argument says."""
    device = proxy.loaded()
    assert device is not None
    {"addresses": addresses, "most": most}[sys.argv[1]](device)


if __name__ == "__main__":
    main()
