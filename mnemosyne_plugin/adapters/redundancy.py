"""What a lost worker's state comes back from: chosen, checked and told to the user."""

from collections.abc import Sequence
from dataclasses import dataclass

from mnemosyne_plugin.config import Config
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.commit import buddies
from mnemosyne_plugin.state.snapshot import Footprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Redundancy:
    """The choice for one trainer."""

    kind: str
    """replica, buddy or none."""
    nodes: Sequence[int]
    """The node that each rank is on."""
    num_buddies: int = 0
    snapshot_every: int = 1

    @classmethod
    def of(cls, config: Config, is_sharded: bool, nodes: Sequence[int]) -> "Redundancy":
        """Choose what ``config`` asks for; ConfigError if it cannot be had.

        is_sharded: some state is on one rank only.
        """
        kind = config.redundancy
        if kind == "auto":
            kind = "buddy" if is_sharded else "replica"
        if kind == "replica" and is_sharded:
            raise ConfigError(
                "mnemosyne.redundancy is 'replica', but with ZeRO 1-3, a pipeline, "
                "experts or Megatron each rank may hold state that no other rank has; "
                "use 'buddy' or 'auto'"
            )
        if kind == "none" and (config.checkpoint_dir or config.on_state_lost != "stop"):
            raise ConfigError(
                "mnemosyne.redundancy is 'none', which leaves the trainer "
                "untouched: checkpoint_dir and on_state_lost would do nothing"
            )
        if kind != "buddy":
            return cls(kind=kind, nodes=nodes)
        if config.buddies >= len(nodes):
            raise ConfigError(
                f"mnemosyne.buddies is {config.buddies}, but a rank of this "
                f"job has only {len(nodes) - 1} others"
            )
        return cls(
            kind=kind,
            nodes=nodes,
            num_buddies=config.buddies,
            snapshot_every=config.snapshot_every,
        )

    @property
    def outlives_a_node(self) -> bool:
        """Whether each rank has a buddy on another node."""
        nodes = self.nodes
        return all(
            any(nodes[b] != node for b in buddies(rank, nodes, self.num_buddies))
            for rank, node in enumerate(nodes)
        )

    def start_line(self, *, has_loader: bool) -> str:
        """Say at the start what is protected, and by what."""
        if self.kind == "none":
            return (
                "mnemosyne: NOT protected: mnemosyne.redundancy is 'none', so nothing "
                "is kept and the death of a worker starts the job again"
            )
        data = (
            "data position (lines above)"
            if has_loader
            else "NOT the data position (no training_data, no resumable loader so far)"
        )
        return (
            f"mnemosyne: {len(self.nodes)} ranks protected against the death of "
            f"workers: parameters, optimizer, LR scheduler ({self._by()}), RNG and "
            f"{data}; not yet: hangs, loss of a node, collectives outside of the "
            "training step"
        )

    def tell(self, footprint: Footprint) -> None:
        """Print ``footprint_line``."""
        print(self.footprint_line(footprint), flush=True)

    def footprint_line(self, footprint: Footprint) -> str:
        """Say what a rank's snapshots cost, once that is known."""
        every = self.snapshot_every
        return (
            f"mnemosyne: a snapshot of rank 0 has {_size(footprint.image_bytes)}; each "
            f"{'step' if every == 1 else f'{every} steps'} it sends "
            f"{_size(footprint.sent_bytes)} to its buddies, and keeps "
            f"{_size(footprint.host_bytes)} of host memory (two versions of its own "
            "and of each rank whose buddy it is)"
        )

    def _by(self) -> str:
        if self.kind == "replica":
            return "replicas"
        steps = self.snapshot_every
        how_often = "each step" if steps == 1 else f"each {steps} steps"
        whose = (
            "a buddy" if self.num_buddies == 1 else f"{self.num_buddies} buddies"
        ) + (
            " on another node"
            if self.outlives_a_node
            else " on the same node: its loss loses both"
        )
        return f"snapshots {how_often}, here and with {whose}"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
