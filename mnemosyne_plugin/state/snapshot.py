"""Snapshots of state without a replica (a ZeRO shard), here and with the buddies.

After a step each rank copies its shard into host memory and sends the copy to its
buddies while the next step computes. Its own copy undoes a step that was half done; a
buddy's copy refills a newcomer. Of each rank the newest two versions are kept, and a
rank votes only when it holds its wards' newest: so whatever dies and when, one
version is complete everywhere.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mnemosyne_plugin.errors import RecoverableError
from mnemosyne_plugin.state.image import Copying, Image, Shard
from mnemosyne_plugin.state.transfer import Endpoint

_HEADER_TAG, _DATA_TAG, _REFILL_TAG = 131, 132, 133
_KEPT_VERSIONS = 2
_HEADER_NUMBERS = 5


@dataclass(frozen=True, slots=True)
class Footprint:
    """What snapshots cost a rank."""

    image_bytes: int
    """Of one version of its shard."""
    sent_bytes: int
    """To all of its buddies, for one version."""
    host_bytes: int
    """Of host memory: the versions that it keeps of itself and of its wards."""


class Snapshots:
    """This rank's images and those of its wards. Used by one thread at a time."""

    def __init__(
        self, buddies: Sequence[int], wards: Sequence[int], every: int = 1
    ) -> None:
        """Keep snapshots of each version that ``every`` divides."""
        self._buddies = buddies
        self._every = every
        self._base = 0  # the newest version that was kept without being due
        self._own: dict[int, Image] = {}
        self._copying: Copying | None = None
        self._of_wards: dict[int, dict[int, Image]] = {ward: {} for ward in wards}
        self._incoming: dict[int, _Incoming] = {}
        self._sends: list[Any] = []
        self._endpoints: tuple[Endpoint, Endpoint] | None = None

    def connect(
        self, endpoint: Endpoint, standing: Endpoint, holders: Collection[int]
    ) -> None:
        """Use these endpoints from now on: called in every new epoch.

        holders: the buddies that have this rank's newest image already.
        standing: for receives that may never be answered, so without a deadline.
        """
        self._endpoints = endpoint, standing
        self._sends = []
        self._incoming = {
            ward: _Incoming(endpoint, standing, ward, partial(_make_room, images))
            for ward, images in self._of_wards.items()
        }
        if self._own:
            self._send(self._own[max(self._own)], set(self._buddies) - set(holders))

    def due(self, version: int) -> int:
        """Return the newest version up to ``version`` of which there are snapshots."""
        return max(self._base, version - version % self._every)

    def take(
        self, version: int, shard: Shard, pack: bytes, *, is_base: bool = False
    ) -> None:
        """Copy the shard if a snapshot of ``version`` is due, and start sending it.

        is_base: it is due in any case. All ranks say that of the same versions.
        """
        if is_base:
            self._base = version
        if self.due(version) != version:
            return
        # The last vote has told that all ranks hold the newest: the other one may go.
        spare = _make_room(self._own)
        self._copying = Copying(version, shard, pack, spare)
        self._go_on()

    def _go_on(self) -> None:
        """Start sending the image in the making, if it is made."""
        if self._copying is not None and self._copying.is_done:
            self._finish()

    def _finish(self) -> None:
        if self._copying is None:
            return
        image = self._copying.finish()
        self._copying = None
        self._own[image.version] = image
        if self._endpoints is not None:
            self._send(image, self._buddies)

    def lose_device(self) -> None:
        """What was to be copied from a device is gone."""
        self._copying = None

    def collect(self) -> None:
        """Take in what has arrived of the wards' images, without waiting."""
        self._go_on()
        for ward, incoming in self._incoming.items():
            while (image := incoming.poll()) is not None:
                self._of_wards[ward][image.version] = image

    def collect_last(self) -> None:
        """As ``collect``, behind the end of an epoch: nothing more will arrive."""
        self._endpoints = None
        self._finish()
        for ward, incoming in self._incoming.items():
            if (image := incoming.last()) is not None:
                self._of_wards[ward][image.version] = image
        self._incoming = {}

    def complete(self, version: int) -> None:
        """Wait until this rank's wards' snapshots, and its own, are where they belong.

        Raises the RecoverableError that ended the transfer.
        """
        self._finish()
        for ward, images in self._of_wards.items():
            while self.due(version) not in images:
                image = self._incoming[ward].wait()
                images[image.version] = image
        for work in self._sends:
            work.wait()
        self._sends = []

    def own(self, version: int) -> Image:
        """Return this rank's image of ``version``."""
        return self._own[version]

    def versions(self) -> tuple[int, ...]:
        """Return the versions of this rank that it holds."""
        return tuple(self._own)

    def held(self) -> dict[int, tuple[int, ...]]:
        """Return ward -> versions of it that this rank holds."""
        return {ward: tuple(images) for ward, images in self._of_wards.items()}

    def adopt(self, image: Image) -> None:
        """On a newcomer: its own snapshot is the one that a buddy had kept."""
        self._own[image.version] = image
        self._base = image.version

    def forget_after(self, version: int) -> None:
        """Drop all newer versions: the job has gone back to this one."""
        self._base = min(self._base, version)
        for images in (self._own, *self._of_wards.values()):
            for newer in [number for number in images if number > version]:
                del images[newer]

    def footprint(self) -> Footprint:
        """Return what snapshots as large as the newest ones cost."""
        kept = [images for images in (self._own, *self._of_wards.values()) if images]
        host_bytes = sum(images[max(images)].host_bytes for images in kept)
        own = len(self._own[max(self._own)].data) if self._own else 0
        return Footprint(own, own * len(self._buddies), _KEPT_VERSIONS * host_bytes)

    def _send(self, image: Image, buddies: Collection[int]) -> None:
        assert self._endpoints is not None
        endpoint, standing = self._endpoints
        for buddy in sorted(buddies):
            self._sends.append(standing.send([image.header()], buddy, _HEADER_TAG))
            self._sends.append(endpoint.send([image.data], buddy, _DATA_TAG))

    def refill(self, endpoint: Endpoint, ward: int, version: int) -> list[Any]:
        """Start sending a ward's image to the newcomer that has its rank now."""
        image = self._of_wards[ward][version]
        return [
            endpoint.send([content], ward, _REFILL_TAG)
            for content in (image.header(), image.data)
        ]


class _Incoming:
    """Receives the images of one ward, one after the other."""

    def __init__(
        self,
        endpoint: Endpoint,
        standing: Endpoint,
        ward: int,
        make_room: Callable[[], torch.Tensor | None],
    ) -> None:
        """make_room: returns memory for the next image, if there is some."""
        self._endpoint = endpoint
        self._standing = standing
        self._ward = ward
        self._make_room = make_room
        self._expect_header()

    def poll(self) -> Image | None:
        """Return the next image if it is complete; never waits."""
        try:
            if self._image is None and self._work.is_completed():
                self._expect_data()
            is_here = self._image is not None and self._work.is_completed()
            return self.wait() if is_here else None
        except RecoverableError:
            return None  # cancelled; the next `connect` asks again

    def last(self) -> Image | None:
        """Return the image that is complete, if any, and expect no further one."""
        try:
            if self._image is not None and self._work.is_completed():
                self._work.wait()
                return self._image
        except RecoverableError:
            pass
        return None

    def wait(self) -> Image:
        """Wait for the next image."""
        if self._image is None:
            self._expect_data()
        assert self._image is not None
        self._work.wait()
        image = self._image
        self._expect_header()
        return image

    def _expect_header(self) -> None:
        self._image: Image | None = None
        self._header = torch.zeros(_HEADER_NUMBERS, dtype=torch.int64)
        self._work = self._standing.recv([self._header], self._ward, _HEADER_TAG)

    def _expect_data(self) -> None:
        self._work.wait()
        self._image = Image.of_header(self._header, self._make_room())
        self._work = self._endpoint.recv([self._image.data], self._ward, _DATA_TAG)


def receive_refill(endpoint: Endpoint, source: int) -> Image:
    """On a newcomer: wait for the image that ``Snapshots.refill`` sends."""
    header = torch.zeros(_HEADER_NUMBERS, dtype=torch.int64)
    endpoint.recv([header], source, _REFILL_TAG).wait()
    image = Image.of_header(header, None)
    endpoint.recv([image.data], source, _REFILL_TAG).wait()
    return image


def _make_room(images: dict[int, Image]) -> torch.Tensor | None:
    """Drop the older versions, so that one may be added; return an image's memory."""
    dropped = [images.pop(old) for old in sorted(images)[: 1 - _KEPT_VERSIONS]]
    return dropped[-1].data if dropped else None
