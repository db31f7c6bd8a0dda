"""What a rank keeps, here and with its buddies, so that a failure loses nothing.

What is a rank's own (random state, data position) is its *pack*. Where all other state
has replicas, packs travel to the buddies before each vote; where a rank has a shard,
its snapshots carry the pack.
"""

import copy
import pickle
from collections.abc import Sequence
from typing import Any, Protocol

from mnemosyne_plugin.errors import NoSourceForState
from mnemosyne_plugin.recovery.commit import Decision, Report, buddies, wards
from mnemosyne_plugin.recovery.control import ControlGroup
from mnemosyne_plugin.state.image import Shard
from mnemosyne_plugin.state.manifest import TrainingState
from mnemosyne_plugin.state.mirror import Mirrors, capacity_for
from mnemosyne_plugin.state.rng import RngState, capture_rng, restore_rng, same_rng
from mnemosyne_plugin.state.snapshot import Footprint, Snapshots, receive_refill
from mnemosyne_plugin.state.transfer import (
    Carrier,
    IncomingBlob,
    receive_state,
    send_blob,
    send_state,
)

_LOCAL_TAG = 121


class Position(Protocol):
    """Where this rank is in its data; the adapter implements it for its loader."""

    def get(self) -> Any:
        """Return the position behind the last batch handed out. Picklable."""

    def seek(self, position: Any, rng: RngState) -> None:
        """Hand out the batches behind ``position``; ``rng`` is the state there."""


class Protection:
    """The state of one rank, and its copies."""

    def __init__(
        self,
        training: TrainingState,
        position: Position | None,
        shard: Shard | None,
        *,
        rank: int,
        nodes: Sequence[int],
        num_buddies: int,
        snapshot_every: int,
        control: ControlGroup,
    ) -> None:
        """shard: what only this rank has. nodes: the node that each rank is on."""
        ring = (rank, nodes, num_buddies)
        self._training = training
        self._position = position
        self._shard = shard
        self._rank = rank
        self._control = control
        self._mirrors = Mirrors(buddies(*ring), wards(*ring))
        self._snapshots: Snapshots | None = None
        if shard is not None:
            self._snapshots = Snapshots(buddies(*ring), wards(*ring), snapshot_every)
            self._mirrors.num_kept = 2 * snapshot_every + 1
        self.is_in_place = shard is None
        """Whether a death loses nothing from now on."""
        self.is_clean = True
        """Not in the middle of a mutation. Always, where there is no shard."""
        self.needs_replica = False
        """Whether the device lost what its replicas hold; the host has the rest."""
        self._scalars: Any = None  # of the next step, where this rank is not in it yet
        self._rng: RngState | None = None
        self._begin_rng: RngState | None = None
        self._has_moved_between = False

    @property
    def is_sharded(self) -> bool:
        """Whether this rank has state that no other one has."""
        return self._shard is not None

    # --- one step -----------------------------------------------------------------

    def begin(self, version: int) -> None:
        """Note the random state in front of a step, and tell it if it has moved.

        The first time it is collective: copies of all that there is are made.
        """
        if self._begin_rng is not None:
            restore_rng(self._begin_rng)
            self._begin_rng = None
        rng = capture_rng()
        if self._rng is not None and same_rng(rng, self._rng):
            return
        pack = pickle.dumps(rng)
        if not self._mirrors.is_connected:
            self._connect_mirrors(self._control.maximum(len(pack)))
            if self._snapshots is not None and not self.is_in_place:
                self._snapshots.connect(self._control, self._control.standing, ())
                self.take(version)
                self._snapshots.complete(version)
            self.is_in_place = True
        self._has_moved_between |= self._rng is not None
        self._rng = rng
        self._mirrors.send_begin(version, pack)

    def catch_up(self) -> None:
        """In front of a step: take what it begins with, if others came to it first."""
        self._load_scalars()
        self._scalars = None

    def _load_scalars(self) -> None:
        if self._scalars is not None:
            self._training.load_scalars(self._scalars)

    def prepare(self, version: int, rng: RngState, *, is_new: bool) -> None:
        """Have everything in place that the commit of step ``version`` relies on.

        rng: the state behind the step. is_new: the step is not made again.
        """
        if is_new:  # else the position may be far behind it
            self._mirrors.remember(version + 1, self._pack(rng))
        self.collect()
        if self._snapshots is None:
            self._mirrors.exchange(version + 1)
        else:
            self._snapshots.complete(version)

    def mutate(self, rng: RngState) -> None:
        """The step is committed; ``rng`` is the state behind it."""
        self._rng = rng
        self.is_clean = self._shard is None

    def take(self, version: int) -> None:
        """Take a snapshot of the shard, if there is one and it is due."""
        self.is_clean = True
        if self._snapshots is not None:
            assert self._shard is not None
            pack = self._mirrors.own(version) or b""
            self._snapshots.take(version, self._shard, pack)

    def begin_load(self, version: int) -> None:
        """In front of a load: have ``version`` where a failure of it goes back to.

        Raises the RecoverableError that ended a transfer.
        """
        assert self._snapshots is not None and self._shard is not None
        if self._snapshots.due(version) != version:
            pack = self._mirrors.own(version) or b""
            self._snapshots.take(version, self._shard, pack, is_base=True)
        self._snapshots.complete(version)

    def end_load(self, version: int) -> None:
        """The shard was loaded, and is ``version`` now; nothing goes back behind it."""
        assert self._snapshots is not None and self._shard is not None
        # A load moves neither the random state nor the data, and the script of a
        # newcomer has come to neither of them yet.
        rng = self._begin_rng or self._rng or capture_rng()
        local = pickle.loads(self._mirrors.own(version - 1) or self._pack(rng))
        local |= {"rng": rng, "has_moved_between": self._has_moved_between}
        pack = pickle.dumps(local)
        self._mirrors.remember(version, pack)
        self.is_clean = True
        self._snapshots.take(version, self._shard, pack, is_base=True)

    def collect(self) -> None:
        """Take in what buddies have sent, without waiting."""
        self._mirrors.collect()
        if self._snapshots is not None:
            self._snapshots.collect()

    def settle(self, version: int) -> None:
        """Behind the last step: see its snapshots in place."""
        if self._snapshots is not None and self.is_in_place:
            self._snapshots.complete(version)

    def horizon(self, version: int) -> int:
        """Return the oldest step that a failure behind step ``version`` may redo."""
        return self._snapshots.due(version) if self._snapshots else version + 1

    def footprint(self, version: int) -> Footprint | None:
        """Return what snapshots cost, if one of a made step is in place."""
        # An optimizer makes its moments in the first step: they count from then on.
        if self._snapshots is None or not self._snapshots.due(version):
            return None
        return self._snapshots.footprint()

    def _pack(self, rng: RngState) -> bytes:
        position = self._position.get() if self._position is not None else None
        return pickle.dumps(
            {
                "rng": rng,
                "has_moved_between": self._has_moved_between,
                "position": position,
                "training": self._training.local(),
            }
        )

    # --- recovery -----------------------------------------------------------------

    def lose_device(self) -> None:
        """Take note that the contents of device memory are gone.

        Raises NoSourceForState if they were the only copy.
        """
        if self._snapshots is None:
            self.needs_replica = True
            return
        self._snapshots.lose_device()
        if not self._snapshots.versions():
            raise NoSourceForState(
                f"rank {self._rank} lost its device before there was a copy of its "
                "shard; start the job again",
                (f"shard/{self._rank}",),
            )
        self.is_clean = False

    def report(self) -> dict[str, Any]:
        """Return this part of a Report, behind the end of an epoch."""
        self._mirrors.collect_last()
        facts: dict[str, Any] = {
            "mirrors": self._mirrors.held(),
            "mirror_bytes": len(pickle.dumps(capture_rng())),
        }
        if self._snapshots is not None:
            self._snapshots.collect_last()
            facts |= {
                "is_sharded": True,
                "is_clean": self.is_clean,
                "snapshots": self._snapshots.versions(),
                "wards": self._snapshots.held(),
            }
        return facts

    def restore(self, decision: Decision, version: int, carrier: Carrier | None) -> int:
        """Send or take what the newcomers lack; all go to ``decision.target``.

        carrier: of what lies on devices; all ranks have one, or none has. Returns the
        bytes that this rank has received. With a shard call ``rebuild`` next:
        parameters follow from the shards of all.
        """
        is_ahead = self.needs_replica and decision.target > version
        if not is_ahead and self._scalars is None:
            return self._restore(decision, version, carrier)
        # The script has yet to do here what it has done elsewhere behind the mutation,
        # such as the scheduler's step: what came of that is for the next step.
        own = copy.deepcopy(self._training.scalars())
        self._load_scalars()
        try:
            size = self._restore(decision, version, carrier)
            self._scalars = copy.deepcopy(self._training.scalars())
        finally:
            self._training.load_scalars(own)
        return size

    def _restore(
        self, decision: Decision, version: int, carrier: Carrier | None
    ) -> int:
        if self._rank in decision.sources:
            self._go_back(decision.target, version)
        works: list[Any] = []
        for newcomer, source in decision.local_sources.items():
            if source == self._rank:
                pair = self._mirrors.packs_of(newcomer, decision.target)
                blob = pickle.dumps(pair)
                works += send_blob(self._control, blob, newcomer, _LOCAL_TAG)
        for newcomer, source in decision.shard_sources.items():
            if source == self._rank:
                assert self._snapshots is not None
                works += self._snapshots.refill(
                    self._control, newcomer, decision.target
                )
        for newcomer in decision.newcomers:
            if self._rank in decision.sources:
                send_state(
                    self._control,
                    self._training,
                    rank=self._rank,
                    sources=decision.sources,
                    newcomer=newcomer,
                    carrier=carrier,
                )
        for work in works:
            work.wait()
        is_newcomer = self._rank in decision.newcomers
        return self._receive(decision, carrier) if is_newcomer else 0

    def _receive(self, decision: Decision, carrier: Carrier | None) -> int:
        """Take this newcomer's state."""
        after, begin = b"", b""
        source = decision.local_sources.get(self._rank)
        if source is not None:
            blob = IncomingBlob(self._control, source, _LOCAL_TAG).wait()
            after, begin = pickle.loads(blob)
        size = receive_state(
            self._control, self._training, sources=decision.sources, carrier=carrier
        )
        if self._snapshots is not None:
            assert self._shard is not None
            image = receive_refill(self._control, decision.shard_sources[self._rank])
            self.is_clean = False
            after = image.load(self._shard)
            self._snapshots.adopt(image)
            size += len(image.data)
        if self.needs_replica:
            # Its own random state and position in the data are here, and newer.
            local = pickle.loads(after)["training"] if after else {}
            self._training.load_local(local)
            self.needs_replica = False
        elif after:
            self._take_local(decision.target, after, begin)
        return size

    def rebuild(self) -> None:
        """With all shards in place, make what follows from them. Collective."""
        assert self._shard is not None
        self._shard.rebuild()
        self.is_clean = True

    def connect(self, reports: Sequence[Report], target: int) -> None:
        """In a new epoch: have copies of ``target`` where they belong."""
        self._connect_mirrors(max(report.mirror_bytes for report in reports))
        if self._snapshots is None:
            self._mirrors.exchange(target)
            return
        newest = self._snapshots.due(target)
        holders = [r.rank for r in reports if newest in r.wards.get(self._rank, ())]
        self._snapshots.connect(self._control, self._control.standing, holders)
        self.is_in_place = True

    def _connect_mirrors(self, largest_pack_bytes: int) -> None:
        capacity = capacity_for(largest_pack_bytes)
        self._mirrors.connect(self._control, self._control.standing, capacity)

    def _go_back(self, target: int, version: int) -> None:
        """Bring this rank's own state to ``target``."""
        if self._snapshots is None or (self.is_clean and version == target):
            self._training.rewind()
        else:
            assert self._shard is not None
            self.is_clean = False
            pack = self._snapshots.own(target).load(self._shard)
            self._rng = pickle.loads(pack)["rng"] if pack else None
        if self._snapshots is not None:
            self._snapshots.forget_after(target)

    def _take_local(self, version: int, after: bytes, begin: bytes) -> None:
        self._mirrors.remember(version, after)
        local = pickle.loads(after)
        restore_rng(local["rng"])
        self._rng = local["rng"]
        self._has_moved_between = local["has_moved_between"]
        if begin:
            self._begin_rng = pickle.loads(begin)
        elif not local["position"] and not self._has_moved_between:
            # The script draws nothing between its steps: what this one drew since
            # (it may seed after `attach`) belongs to its set-up.
            self._begin_rng = local["rng"]
        if self._position is not None:
            self._position.seek(local["position"], local["rng"])
        self._training.load_local(local["training"])
