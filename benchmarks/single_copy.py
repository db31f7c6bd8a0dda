"""Whether one copy out of another process beats two through a ring of shared memory.

A message of 64 MiB goes from one process to another: by process_vm_readv, chunk by
chunk; and copied into a small shared ring that stays in cache, and out of it again, as
our links do. Both are done by one core, so what is compared is the work, not how well
two cores share it.
"""

import ctypes
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection

MESSAGE_BYTES = 64 << 20
CHUNKS = (16 << 10, 64 << 10, 256 << 10, 1 << 20)
REPEATS = 7

_libc = ctypes.CDLL(None, use_errno=True)


class _Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def main() -> None:
    ours, theirs = Pipe()
    process = Process(target=hold, args=(theirs,), daemon=True)
    process.start()
    source = ours.recv()
    target = address_of(filled(MESSAGE_BYTES, 2))
    print("| chunk, bytes | process_vm_readv, GB/s | two copies, GB/s | ratio |")
    print("|---|---|---|---|")
    for chunk in CHUNKS:
        ring = address_of(filled(chunk, 3))
        local = address_of(filled(MESSAGE_BYTES, 4))
        once = rate(lambda c=chunk: read(process.pid, source, target, c))
        twice = rate(lambda c=chunk, r=ring, s=local: relay(s, r, target, c))
        print(f"| {chunk} | {once:.1f} | {twice:.1f} | {twice / once:.2f} |")
    ours.send("end")
    process.join()


def hold(pipe: Connection) -> None:
    """Be the other process: tell where 64 MiB are, and wait."""
    pipe.send(address_of(filled(MESSAGE_BYTES, 1)))
    pipe.recv()


_kept: list[tuple[mmap.mmap, ctypes.Array[ctypes.c_char]]] = []


def filled(size: int, value: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    memory.write(bytes([value]) * size)
    return memory


def address_of(memory: mmap.mmap) -> int:
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    _kept.append((memory, view))  # else it is unmapped
    return ctypes.addressof(view)


def read(pid: int | None, source: int, target: int, chunk: int) -> None:
    for at in range(0, MESSAGE_BYTES, chunk):
        to, there = _Part(target + at, chunk), _Part(source + at, chunk)
        count = _libc.process_vm_readv(
            pid, ctypes.byref(to), 1, ctypes.byref(there), 1, 0
        )
        if count != chunk:
            error = os.strerror(ctypes.get_errno())
            sys.exit(f"single_copy.py: the kernel does not allow it: {error}")


def relay(source: int, ring: int, target: int, chunk: int) -> None:
    for at in range(0, MESSAGE_BYTES, chunk):
        ctypes.memmove(ring, source + at, chunk)
        ctypes.memmove(target + at, ring, chunk)


def rate(copy: Callable[[], None]) -> float:
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - begin)
    return MESSAGE_BYTES / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    main()
