"""The channel, and the death of its peer at any byte."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from mnemosyne_plugin.errors import MnemosyneError, PeerLost
from mnemosyne_plugin.recovery import channel as channel_module
from mnemosyne_plugin.recovery.channel import MAX_MESSAGE_BYTES, Channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def raw() -> tuple[Channel, socket.socket]:
    """Return a channel whose peer may write any bytes."""
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send("first", value=1)
    ours.send("second", text="\u00e9", nested={"a": [None, 1.5]})
    assert theirs.receive(1) == {"kind": "first", "value": 1}
    assert theirs.receive(1) == {
        "kind": "second",
        "text": "\u00e9",
        "nested": {"a": [None, 1.5]},
    }


def test_a_descriptor_travels_with_its_message(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    ours.send("take", fds=[write_end])
    os.close(write_end)
    assert theirs.receive(1) == {"kind": "take"}
    copy = theirs.take_fd()
    assert not os.get_inheritable(copy)
    os.write(copy, b"x")
    os.close(copy)
    assert os.read(read_end, 2) == b"x"
    os.close(read_end)
    with pytest.raises(MnemosyneError):
        theirs.take_fd()


def test_a_message_larger_than_any_buffer_passes(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    text = "x" * (5 << 20)
    sender = threading.Thread(target=ours.send, args=("big",), kwargs={"text": text})
    sender.start()
    message = theirs.receive(10)
    sender.join(10)
    assert message is not None and message["text"] == text


def test_messages_of_many_threads_do_not_mix(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair

    def talk(who: int) -> None:
        for number in range(50):
            ours.send("hello", who=who, number=number, padding="x" * 10_000)

    threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    heard: dict[int, list[int]] = {who: [] for who in range(4)}
    for _ in range(200):
        message = theirs.receive(10)
        assert message is not None
        heard[message["who"]].append(message["number"])
    assert all(numbers == list(range(50)) for numbers in heard.values())
    for thread in threads:
        thread.join(10)


def test_no_message_in_time_is_a_timeout(pair: tuple[Channel, Channel]) -> None:
    for timeout_s in (0, 0.01):
        with pytest.raises(TimeoutError):
            pair[0].receive(timeout_s)


def test_nothing_is_read_ahead_of_a_selector(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send("one")
    ours.send("two")
    assert theirs.receive(0) == {"kind": "one"}
    # The second message is still in the socket, where a selector sees it.
    peeked = socket.socket(fileno=os.dup(theirs.fileno()))
    assert peeked.recv(4, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    peeked.close()


@pytest.mark.parametrize("length", range(len(frame(b'{"kind": "x"}'))))
def test_a_peer_that_dies_at_any_byte_is_eof(length: int) -> None:
    ours, theirs = raw()
    theirs.sendall(frame(b'{"kind": "x"}')[:length])
    theirs.close()
    assert ours.receive(1) is None
    assert ours.receive(1) is None
    ours.close()


def test_a_whole_message_in_front_of_the_death_is_received() -> None:
    ours, theirs = raw()
    theirs.sendall(frame(b'{"kind": "last"}') + b"\0\0")
    theirs.close()
    assert ours.receive(1) == {"kind": "last"}
    assert ours.receive(1) is None
    ours.close()


def test_a_half_message_is_waited_for() -> None:
    ours, theirs = raw()
    data = frame(b'{"kind": "x"}')
    theirs.sendall(data[:7])
    with pytest.raises(TimeoutError):
        ours.receive(0)
    theirs.sendall(data[7:])
    assert ours.receive(0) == {"kind": "x"}
    ours.close()
    theirs.close()


def test_sending_to_a_dead_peer_is_peer_lost(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(PeerLost):
        ours.send("hello")
    assert ours.receive(1) is None


def test_a_peer_that_dies_unread_is_eof(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send("unread")
    theirs.close()  # with data in its buffer: the kernel resets the connection
    assert ours.receive(1) is None


def test_a_closed_channel_raises_nothing_strange(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    ours.close()
    assert ours.fileno() == -1
    with pytest.raises(PeerLost):
        ours.send("hello")
    assert ours.receive(1) is None


def test_a_peer_that_reads_nothing_does_not_block_for_ever(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "SEND_TIMEOUT_S", 0.05)
    with pytest.raises(MnemosyneError):
        pair[0].send("big", text="x" * (5 << 20))


@pytest.mark.parametrize(
    "data",
    [
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"),
        b"\xff\xff\xff\xff",
        frame(b"{"),
        frame(b"\xff\xfe"),
        frame(b"[]"),
        frame(b"{}"),
        frame(b'{"kind": 1}'),
        frame(b""),
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    ours, theirs = raw()
    theirs.sendall(data)
    with pytest.raises(MnemosyneError):
        ours.receive(1)
    ours.close()
    theirs.close()


def test_a_message_that_is_too_long_is_not_sent(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(MnemosyneError):
        pair[0].send("big", text="x" * MAX_MESSAGE_BYTES)
    with pytest.raises(TimeoutError):
        pair[1].receive(0)
