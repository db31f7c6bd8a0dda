"""A world whose network loses everything for a while; run by test_adversity.py.

In a network namespace of its own, whose loopback interface goes down: TCP goes on to
hope, as over a cable that was pulled out. Exit code 77: no namespace can be made here.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys

from adversity import all_reduce, connect, identity, receive, reduce_in_time, try_to
from world import World

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
SIZE = 3


def leave_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (CLONE_NEWNET, CLONE_NEWNET | CLONE_NEWUSER):
        if libc.unshare(flags) == 0:
            return
    reason = os.strerror(ctypes.get_errno())
    print(f"cannot make a network namespace: {reason}", file=sys.stderr)
    raise SystemExit(77)


def set_loopback(up: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        request = struct.pack("16sH14x", b"lo", 0)
        [flags] = struct.unpack("16xH14x", fcntl.ioctl(one, SIOCGIFFLAGS, request))
        flags = flags | IFF_UP if up else flags & ~IFF_UP
        try:
            fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags))
        except PermissionError as error:
            print(f"cannot configure the namespace: {error}", file=sys.stderr)
            raise SystemExit(77) from error


def main() -> None:
    leave_network()
    set_loopback(True)
    with World(SIZE, "tcp") as world:
        world.run(connect)
        before = world.run(identity)
        for numel in (10, 300_000):
            set_loopback(False)
            failed = world.run(try_to, reduce_in_time, numel, 0.5)
            assert {kind for kind, _, _ in failed} == {"CollectiveTimeout"}, failed
            # Still in the dark: the next epoch fails in time as well.
            world.seat()
            failed = world.run(try_to, receive, 2, 0.4, ranks=[0, 1])
            assert [kind for kind, _, _ in failed] == ["CollectiveTimeout"] * 2
            assert [rank for _, rank, _ in failed] == [2, 2], failed
            set_loopback(True)
            world.seat()
            assert world.run(all_reduce, numel) == [6.0] * SIZE
            assert world.run(connect) == [[0.0, 1.0, 2.0]] * SIZE
        assert world.run(identity) == before


if __name__ == "__main__":
    main()
