"""The channel between a worker, or the nursery, and its agent.

One end of a socketpair; a message is a 4-byte big-endian length and a JSON object
with a ``kind``. Nothing listens, so nobody else can connect.
"""

import json
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from mnemosyne_plugin.errors import CollectiveTimeout, MnemosyneError, PeerLost

MAX_MESSAGE_BYTES = 64 << 20
"""More than any set-up log; a longer length is garbage, not a message."""

SEND_TIMEOUT_S = 30.0
"""A peer that reads nothing for so long, with its socket buffer full, hangs."""

_READ_BYTES = 1 << 18
_MAX_FDS = 16


class Channel:
    """One end of a channel.

    Any thread may send. One thread at a time receives. The socket is non-blocking;
    waits are polls with a deadline.
    """

    def __init__(self, end: socket.socket | int) -> None:
        self._socket = socket.socket(fileno=end) if isinstance(end, int) else end
        self._socket.setblocking(False)
        self._send_lock = threading.Lock()
        self._buffer = bytearray()
        self._fds: list[int] = []

    @staticmethod
    def pair() -> "tuple[Channel, Channel]":
        """Return both ends of a new channel."""
        first, second = socket.socketpair()
        return Channel(first), Channel(second)

    def fileno(self) -> int:
        """Return the descriptor, or -1 after ``close``."""
        return self._socket.fileno()

    def send(self, kind: str, *, fds: Sequence[int] = (), **fields: Any) -> None:
        """Send one message; PeerLost if nobody is there to read it.

        The peer gets copies of ``fds`` with it.
        """
        body = json.dumps({"kind": kind, **fields}).encode()
        if len(body) > MAX_MESSAGE_BYTES:
            raise MnemosyneError(f"message {kind} has {len(body)} bytes, too long")
        data = memoryview(len(body).to_bytes(4, "big") + body)
        deadline = time.monotonic() + SEND_TIMEOUT_S
        with self._send_lock:
            while data:
                try:
                    sent = socket.send_fds(
                        self._socket, [data], list(fds), socket.MSG_NOSIGNAL
                    )
                    data, fds = data[sent:], ()
                except BlockingIOError:
                    if not self._wait(select.POLLOUT, deadline):
                        text = f"peer took no bytes of {kind} for {SEND_TIMEOUT_S} s"
                        raise CollectiveTimeout(text) from None
                except OSError as error:
                    raise PeerLost(f"channel closed at {kind}: {error}") from error

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the next message, or None once the peer is gone.

        A message that the peer's death tore is dropped. With ``timeout_s`` 0 it
        never blocks. Raises TimeoutError, or MnemosyneError for what is no message.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while missing := self._missing():
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, missing, _MAX_FDS)
            except BlockingIOError:
                if not self._wait(select.POLLIN, deadline):
                    raise TimeoutError(f"no message in {timeout_s} s") from None
                continue
            except OSError:
                return None
            if not data:
                return None
            self._buffer += data
            for fd in fds:
                os.set_inheritable(fd, False)
            self._fds += fds
        return self._take()

    def take_fd(self) -> int:
        """Return the next descriptor that came with a message; it is the caller's."""
        if not self._fds:
            raise MnemosyneError("a descriptor is missing on a channel")
        return self._fds.pop(0)

    def close(self) -> None:
        """Close this end; the peer sees EOF."""
        self._socket.close()

    def detach(self) -> int:
        """Return the descriptor, which is the caller's from now on."""
        return self._socket.detach()

    def _missing(self) -> int:
        """Return how many bytes to read next; 0 once a message is complete.

        Nothing is read ahead, so a selector that watches the socket never sleeps
        while a message waits here.
        """
        have = len(self._buffer)
        if have < 4:
            return 4 - have
        size = int.from_bytes(self._buffer[:4], "big")
        if size > MAX_MESSAGE_BYTES:
            raise MnemosyneError(f"message of {size} bytes on a channel: garbage")
        return min(4 + size - have, _READ_BYTES)

    def _take(self) -> dict[str, Any]:
        """Return the complete message in the buffer, and empty it."""
        body, self._buffer = bytes(self._buffer[4:]), bytearray()
        try:
            message = json.loads(body)
        except ValueError as error:
            raise MnemosyneError(f"no JSON on a channel: {error}") from error
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise MnemosyneError(f"message without a kind on a channel: {message!r}")
        return message

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Wait until the socket is ready (or at its end); False: out of time."""
        poll = select.poll()
        try:
            poll.register(self._socket, event)
        except ValueError:  # closed by another thread: the next call says so
            return True
        if deadline is None:
            poll.poll()
            return True
        left_ms = (deadline - time.monotonic()) * 1000
        return left_ms > 0 and bool(poll.poll(left_ms))
