"""The ways of training with megatron.core that the matrix has."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from matrix.plan import num_steps

PHASES = (
    *("data", "forward", "p2p", "backward", "reduce", "norm", "vote"),
    *("mid-optimizer", "gather", "between", "recovery"),
)
_STEPS = num_steps(PHASES)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way of training."""

    layout: str
    """TP x PP x DP, and how many chunks of the model a rank has."""
    optimizer: str
    """plain or dist: each data-parallel rank has a part."""
    dtype: str
    overlaps: bool = False
    """Gradients are reduced, and parameters gathered, while the model runs."""
    all_phases: ClassVar[tuple[str, ...]] = PHASES
    script: ClassVar[Path] = Path(__file__).with_name("megatron_train.py")
    preload: ClassVar[tuple[str, ...]] = ("torch._dynamo",)

    @property
    def name(self) -> str:
        overlap = "+overlap" if self.overlaps else ""
        return f"{self.layout}-{self.optimizer}{overlap}-{self.dtype}"

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return {
            "tp2": (2, 1, 0),
            "pp2": (1, 2, 0),
            "pp2v2": (1, 2, 2),
            "tp2pp2": (2, 2, 0),
        }[self.layout]

    @property
    def world_size(self) -> int:
        tensor, pipeline, _ = self._sizes
        return tensor * pipeline * 2

    @property
    def script_args(self) -> list[str]:
        tensor, pipeline, virtual = self._sizes
        args = [f"--steps={_STEPS}", f"--tensor={tensor}", f"--pipeline={pipeline}"]
        args += [f"--virtual={virtual}", f"--dtype={self.dtype}"]
        if self.optimizer == "dist":
            args.append("--distributed-optimizer")
        return args + ["--overlap"] * self.overlaps

    def files(self, folder: Path) -> list[str]:
        return []

    def has_phase(self, phase: str) -> bool:
        if phase == "p2p":
            return self._sizes[1] > 1
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
