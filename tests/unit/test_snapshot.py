"""Snapshots of shards here and with buddies, over endpoints made of queues."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from mnemosyne_plugin.errors import StaleEpoch, StateMismatch
from mnemosyne_plugin.state import snapshot
from mnemosyne_plugin.state.image import Copying
from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.snapshot import Footprint, Snapshots, receive_refill
from wire import Port, Wire

HEADER_TAG, DATA_TAG, REFILL_TAG = 131, 132, 133


class Numbers:
    """A shard of two tensors of odd sizes, and a count."""

    def __init__(self, value: float, size: int = 13) -> None:
        self.value, self.size, self.count = value, size, 0

    def tensors(self) -> dict[str, torch.Tensor]:
        if not hasattr(self, "_tensors"):
            self._tensors = {
                "master": torch.full((self.size,), self.value),
                "half": torch.full((2, 3), -self.value, dtype=torch.bfloat16),
            }
        return self._tensors

    def set(self, value: float) -> None:
        for sign, tensor in zip((1, -1), self.tensors().values(), strict=True):
            tensor.fill_(sign * value)
        self.count = int(value)

    def allocate(self, manifest: Sequence[Entry]) -> dict[str, torch.Tensor]:
        if [entry.shape for entry in manifest] != [
            tuple(tensor.shape) for tensor in self.tensors().values()
        ]:
            raise StateMismatch("other shapes", key=manifest[0].key)
        return self.tensors()

    def scalars(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.count = scalars["count"]

    def rebuild(self) -> None:
        raise AssertionError("not the snapshots' business")

    def holds(self, value: float) -> bool:
        master, half = self.tensors().values()
        return bool((master == value).all() and (half == -value).all())


class Ring:
    """Ranks that are each other's buddies: each keeps the image of the one before."""

    def __init__(self, size: int = 2, every: int = 1) -> None:
        self.size = size
        self.shards = [Numbers(0) for _ in range(size)]
        self.ranks = [
            Snapshots([(rank + 1) % size], [(rank - 1) % size], every)
            for rank in range(size)
        ]
        self.connect()

    def connect(self, holders: Mapping[int, Sequence[int]] | None = None) -> None:
        """Begin an epoch: a wire on which nothing is under way."""
        self.wire = Wire()
        for rank, snapshots in enumerate(self.ranks):
            port = Port(self.wire, rank)
            snapshots.connect(port, port, (holders or {}).get(rank, ()))

    def take(self, version: int) -> None:
        for rank, snapshots in enumerate(self.ranks):
            self.shards[rank].set(version)
            snapshots.take(version, self.shards[rank], f"pack {version}".encode())

    def complete(self, version: int) -> None:
        for snapshots in self.ranks:
            snapshots.complete(version)

    def run(self, last: int) -> None:
        for version in range(last + 1):
            self.take(version)
            self.complete(version)


def test_two_versions_are_kept_here_and_with_the_buddy() -> None:
    ring = Ring()
    ring.run(5)
    for rank, snapshots in enumerate(ring.ranks):
        assert snapshots.versions() == (4, 5)
        assert snapshots.held() == {1 - rank: (4, 5)}


def test_a_version_comes_back_bit_for_bit_and_a_buddy_has_the_same_bytes() -> None:
    ring = Ring()
    ring.run(3)
    mine = ring.ranks[0].own(2)
    assert mine.load(ring.shards[0]) == b"pack 2"
    assert ring.shards[0].holds(2) and ring.shards[0].count == 2
    Copying(2, ring.shards[0], b"", None).finish().load(other := Numbers(9))
    assert other.holds(2)


def test_memory_is_used_in_turns_and_never_more_than_two_images_of_each() -> None:
    ring = Ring()
    snapshots = ring.ranks[0]
    ring.run(1)
    places = {snapshots.own(version).data.data_ptr() for version in (0, 1)}
    for version in range(2, 7):
        ring.take(version)
        ring.complete(version)
        assert snapshots.own(version).data.data_ptr() in places
    size = len(snapshots.own(6).data)
    assert snapshots.footprint() == Footprint(size, size, 4 * size)


def test_a_shard_that_has_grown_gets_memory_that_fits() -> None:
    ring = Ring()
    ring.run(2)
    ring.shards[0] = Numbers(0, size=40)
    ring.take(3)
    ring.complete(3)
    ring.ranks[0].own(3).load(restored := Numbers(0, size=40))
    assert restored.holds(3)


def test_a_transfer_that_is_torn_leaves_the_older_version_with_the_buddy() -> None:
    ring = Ring()
    ring.run(1)
    ring.take(2)
    ring.wire.lose(0, 1, DATA_TAG)
    ring.wire.cut()
    ring.ranks[1].collect()  # takes the header, and then waits in vain
    with pytest.raises(StaleEpoch):
        ring.ranks[1].complete(2)
    ring.ranks[1].collect_last()
    assert ring.ranks[1].held() == {0: (1,)}
    newcomer = Numbers(7)
    for work in ring.ranks[1].refill(Port(wire := Wire(), 1), 0, 1):
        work.wait()
    assert receive_refill(Port(wire, 0), 1).load(newcomer) == b"pack 1"
    assert newcomer.holds(1)


@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_image_is_refused(place: int) -> None:
    (source := Numbers(5)).count = 7
    image = Copying(3, source, b"", None).finish()
    image.data[place] ^= 4
    shard = Numbers(1)
    with pytest.raises(StateMismatch, match="version 3 fails its checksum"):
        image.load(shard)
    assert shard.count == 0  # a damaged head is not even read


def test_damage_on_the_way_to_a_newcomer_is_found() -> None:
    ring = Ring()
    ring.run(1)
    wire = Wire()
    for work in ring.ranks[1].refill(Port(wire, 1), 0, 1):
        work.wait()
    image = receive_refill(Port(wire, 0), 1)
    image.data[1] ^= 1
    with pytest.raises(StateMismatch):
        image.load(Numbers(0))


class SlowCopying(Copying):
    """Is under way until it is told, as a copy from a device."""

    may_end = False

    @property
    def is_done(self) -> bool:
        return self.may_end


def test_an_image_in_the_making_is_sent_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = Ring()
    ring.run(1)
    monkeypatch.setattr(snapshot, "Copying", SlowCopying)
    ring.take(2)
    ring.ranks[0].collect()
    assert ring.ranks[0].versions() == (1,)
    assert ring.wire.num_waiting(0, 1, DATA_TAG) == 0
    monkeypatch.setattr(SlowCopying, "may_end", True)
    ring.ranks[0].collect()
    assert ring.ranks[0].versions() == (1, 2)
    assert ring.wire.num_waiting(0, 1, DATA_TAG) == 1
    monkeypatch.setattr(SlowCopying, "may_end", False)
    for snapshots in reversed(ring.ranks):
        snapshots.complete(2)  # waits for what is not
    assert [snapshots.held() for snapshots in ring.ranks] == [{1: (1, 2)}, {0: (1, 2)}]


def test_an_image_in_the_making_goes_with_the_device_and_stays_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = Ring()
    ring.run(1)
    monkeypatch.setattr(snapshot, "Copying", SlowCopying)
    ring.take(2)
    ring.ranks[1].lose_device()
    ring.wire.cut()
    for snapshots in ring.ranks:
        snapshots.collect_last()
    assert [snapshots.versions() for snapshots in ring.ranks] == [(1, 2), (1,)]
    assert ring.wire.num_waiting(0, 1, HEADER_TAG) == 0  # its epoch is over
    ring.connect()
    assert ring.wire.num_waiting(0, 1, HEADER_TAG) == 1


def test_collect_takes_what_is_complete_and_does_not_wait() -> None:
    ring = Ring()
    ring.run(1)
    ring.ranks[1].collect()
    assert ring.ranks[1].held() == {0: (0, 1)}
    ring.take(2)
    ring.ranks[1].collect()
    assert ring.ranks[1].held() == {0: (1, 2)}


def test_collect_last_takes_what_was_complete_and_posts_no_receive() -> None:
    ring = Ring()
    ring.run(1)
    ring.take(2)
    rank = ring.ranks[1]
    # The header is in, and the data are on their way when the epoch ends.
    held = ring.wire.queue(0, 1, DATA_TAG).get_nowait()
    rank.collect()
    ring.wire.queue(0, 1, DATA_TAG).put(held)
    before = list(ring.wire.receives)
    rank.collect_last()
    assert rank.held() == {0: (1, 2)}
    assert ring.wire.receives == before
    rank.collect()  # until the next epoch there is nothing to collect
    assert ring.wire.receives == before


def test_a_new_epoch_sends_the_newest_only_to_buddies_that_lack_it() -> None:
    ring = Ring(size=3)
    ring.run(2)
    ring.connect(holders={0: [1]})
    waiting = [
        ring.wire.num_waiting(rank, (rank + 1) % 3, DATA_TAG) for rank in range(3)
    ]
    assert waiting == [0, 1, 1]
    ring.ranks[1].complete(2)  # holds it already, so it waits for nothing
    ring.ranks[2].complete(2)
    assert ring.ranks[2].held() == {1: (1, 2)}


def test_a_newcomer_adopts_its_image_and_gets_those_of_its_wards_anew() -> None:
    ring = Ring()
    ring.run(2)
    ring.ranks[0], ring.shards[0] = Snapshots([1], [1]), Numbers(8)
    wire = Wire()
    ring.ranks[1].refill(Port(wire, 1), 0, 2)
    image = receive_refill(Port(wire, 0), 1)
    image.load(ring.shards[0])
    ring.ranks[0].adopt(image)
    assert ring.shards[0].holds(2) and ring.shards[0].count == 2
    ring.connect(holders={0: [1]})
    ring.complete(2)
    assert ring.ranks[0].versions() == (2,)
    assert ring.ranks[0].held() == {1: (2,)}
    ring.take(3)
    ring.complete(3)
    assert ring.ranks[0].held() == {1: (2, 3)}


def test_what_is_newer_than_the_version_gone_back_to_is_forgotten() -> None:
    ring = Ring()
    ring.run(5)
    for rank, snapshots in enumerate(ring.ranks):
        snapshots.forget_after(4)
        assert snapshots.versions() == (4,)
        assert snapshots.held() == {1 - rank: (4,)}
    ring.connect(holders={0: [1], 1: [0]})
    ring.take(5)
    ring.complete(5)
    assert ring.ranks[0].versions() == (4, 5)
    ring.ranks[0].own(5).load(shard := Numbers(0))
    assert shard.holds(5)


def test_only_each_nth_version_has_a_snapshot() -> None:
    ring = Ring(every=3)
    ring.run(10)
    assert [ring.ranks[0].due(version) for version in (8, 9, 10)] == [6, 9, 9]
    assert ring.ranks[0].versions() == (6, 9)
    assert ring.ranks[1].held() == {0: (6, 9)}


def test_a_base_is_kept_where_none_is_due_and_nothing_older_is_waited_for() -> None:
    ring = Ring(every=4)
    ring.run(5)
    for version in (6, 7):  # in front of a load, and behind it
        for rank, snapshots in enumerate(ring.ranks):
            ring.shards[rank].set(version)
            snapshots.take(version, ring.shards[rank], b"", is_base=True)
        ring.complete(version)
    rank = ring.ranks[0]
    assert rank.versions() == (6, 7) and rank.held() == {1: (6, 7)}
    assert [rank.due(version) for version in (7, 8, 9)] == [7, 8, 8]
    ring.complete(7)  # would wait for version 4, which is gone


def test_a_base_that_the_job_went_back_behind_counts_no_more() -> None:
    ring = Ring(every=4)
    ring.run(5)
    ring.ranks[0].take(6, ring.shards[0], b"", is_base=True)
    for snapshots in ring.ranks:
        snapshots.forget_after(4)
    assert [snapshots.due(6) for snapshots in ring.ranks] == [4, 4]
    ring.ranks[1].adopt(Copying(5, ring.shards[0], b"", None).finish())
    assert ring.ranks[1].due(6) == 5  # on a newcomer: the others went back to it
