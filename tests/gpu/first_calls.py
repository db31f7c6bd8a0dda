"""What the driver takes for the start of a process, and which addresses it gives.

python tests/gpu/first_calls.py libcuda.so.1

Without the proxy, whose server does the same.
"""

import ctypes
import sys
import time
from ctypes import byref, c_size_t, c_uint64

GIB = 1 << 30
PROXY_BASE, PROXY_BYTES = 0x600000000000, 1024 * GIB
# Where the proxy could go if it does not get its own range.
OTHERS = (
    *((PROXY_BASE, 256 * GIB), (0x500000000000, PROXY_BYTES)),
    *((0x300000000000, PROXY_BYTES), (0x100000000000, PROXY_BYTES)),
    *((0x7E0000000000, PROXY_BYTES), (0x7E0000000000, 256 * GIB)),
)


def main() -> None:
    """Print a line for each call."""
    driver = ctypes.CDLL(sys.argv[1])

    def timed(name: str, *arguments: object) -> None:
        began = time.monotonic()
        error = getattr(driver, name)(*arguments)
        print(name, f"{(time.monotonic() - began) * 1e3:.1f}", error)

    def reserve(base: int, size: int) -> int:
        address = c_uint64()
        two_mib = c_size_t(2 << 20)
        arguments = (byref(address), c_size_t(size), two_mib, c_uint64(base))
        timed("cuMemAddressReserve", *arguments, c_uint64(0))
        return address.value

    context = ctypes.c_void_p()
    timed("cuInit", 0)
    timed("cuDevicePrimaryCtxRetain", byref(context), 0)
    timed("cuCtxSetCurrent", context)
    print("reserved", hex(reserve(PROXY_BASE, PROXY_BYTES)))
    driver.cuMemAddressFree(c_uint64(PROXY_BASE), c_size_t(PROXY_BYTES))
    for base, size in OTHERS:
        got = reserve(base, size)
        print("other", hex(base), f"{size // GIB} GiB:", hex(got))
        if got:
            driver.cuMemAddressFree(c_uint64(got), c_size_t(size))


if __name__ == "__main__":
    main()
