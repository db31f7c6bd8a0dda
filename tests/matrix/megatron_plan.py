"""The ways of training with megatron.core that the matrix has."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from matrix.plan import num_steps

PHASES = (
    *("data", "forward", "p2p", "backward", "reduce", "norm", "vote"),
    *("mid-optimizer", "gather", "between", "recovery"),
)
_NAMES = {
    "tp": "tensor",
    "pp": "pipeline",
    "v": "virtual",
    "cp": "context",
    "ep": "expert",
    "do": "instances",
}
"""The parts of a layout; do: instances of the distributed optimizer."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way of training."""

    layout: str
    """What the ranks are divided by, and how many chunks of the model a rank has."""
    optimizer: str
    """plain or dist: each data-parallel rank has a part."""
    dtype: str
    overlaps: bool = False
    """Gradients are reduced, and parameters gathered, while the model runs."""
    what: str = ""
    """What is special about it."""
    args: tuple[str, ...] = ()
    all_phases: tuple[str, ...] = PHASES
    """The fewer, the shorter is a run."""
    script: ClassVar[Path] = Path(__file__).with_name("megatron_train.py")
    preload: ClassVar[tuple[str, ...]] = ("torch._dynamo",)

    @property
    def name(self) -> str:
        overlap = "+overlap" if self.overlaps else ""
        what = f" {self.what}" if self.what else ""
        return f"{self.layout}-{self.optimizer}{overlap}-{self.dtype}{what}"

    @property
    def _sizes(self) -> dict[str, int]:
        parts = re.findall(r"([a-z]+)(\d)", self.layout)
        return {name: int(size) for name, size in parts}

    @property
    def world_size(self) -> int:
        """Two replicas; four where nothing else needs as many ranks."""
        sizes = self._sizes
        return max(4, 2 * sizes.get("tp", 1) * sizes.get("pp", 1))

    @property
    def script_args(self) -> list[str]:
        sizes = (f"--{_NAMES[name]}={size}" for name, size in self._sizes.items())
        args = [f"--steps={num_steps(self.all_phases)}", f"--dtype={self.dtype}"]
        args += [*sizes, *self.args]
        if self.optimizer == "dist":
            args.append("--distributed-optimizer")
        return args + ["--overlap"] * self.overlaps

    def files(self, folder: Path) -> list[str]:
        return []

    def has_phase(self, phase: str) -> bool:
        if phase == "p2p":
            return "pp" in self._sizes
        return phase != "gather" or self.optimizer == "dist"

    def nth(self, phase: str) -> int:
        return {"forward": 2, "backward": 2, "p2p": 3}.get(phase, 1)


CONFIGURATIONS = (
    Configuration("tp2", "plain", "bf16"),
    Configuration("tp2", "dist", "fp32"),
    Configuration("pp2", "plain", "fp32"),
    Configuration("pp2", "dist", "bf16", overlaps=True),
    Configuration("pp2v2", "plain", "fp32", overlaps=True),
    Configuration("pp2v2", "dist", "bf16"),
    Configuration("tp2pp2", "plain", "bf16"),
    Configuration("tp2pp2", "dist", "fp32"),
)

# What `make test` has time for.
DIAGONAL = (
    (Configuration("tp2", "dist", "fp32"), "middle"),
    (Configuration("pp2v2", "plain", "fp32", overlaps=True), "two"),
)
