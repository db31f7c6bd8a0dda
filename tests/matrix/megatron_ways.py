"""Ways of training beside the matrix: what else Megatron's ranks are divided by."""

from dataclasses import dataclass

from matrix import megatron_plan
from matrix.megatron_plan import Configuration

PHASES = megatron_plan.PHASES
_OVERFLOWS, _OVERFLOWED = ("--spike=0",), ("--spike=2",)
"""In each step with a kill; in the step before it."""


@dataclass(frozen=True)
class Way(Configuration):
    """A configuration of the matrix, with some things otherwise."""

    def has_phase(self, phase: str) -> bool:
        """Behind an overflow nothing is clipped, mutated or gathered."""
        skipped = ("norm", "mid-optimizer", "gather")
        if self.args == _OVERFLOWS and phase in skipped:
            return False
        return super().has_phase(phase)


def way(name: str, *args: str) -> Way:
    """Return a way by its name, as it is printed."""
    kind, _, what = name.partition(" ")
    layout, optimizer, dtype = kind.split("-")
    optimizer, _, overlap = optimizer.partition("+")
    return Way(layout, optimizer, dtype, bool(overlap), what, args)


_ALLTOALL, _ALLGATHER = "--dispatcher=alltoall", "--dispatcher=allgather"
_BIAS = "--expert-bias"

WAYS = (
    way("ep2-plain-fp32 alltoall", _ALLTOALL),
    way("ep2-plain-bf16 allgather", _ALLGATHER, _BIAS),
    way("ep2-dist-bf16 alltoall", _ALLTOALL, _BIAS),
    way("ep2-dist+overlap-fp32 allgather", _ALLGATHER),
    way("pp2ep2-dist-bf16 alltoall", _ALLTOALL, _BIAS),
    way("cp2-plain-fp32"),
    way("cp2-dist+overlap-bf16"),
    way("pp2cp2-dist-fp32"),
    way("tp2cp2-plain-bf16"),
    way("do2-dist-fp32"),
    way("do2-dist+overlap-bf16"),
    way("ep2do2-dist-bf16 alltoall", _ALLTOALL, _BIAS),
    way("tp2-plain-fp16 in overflows", *_OVERFLOWS),
    way("tp2-plain-fp16 behind overflows", *_OVERFLOWED),
    way("pp2-dist-fp16 in overflows", *_OVERFLOWS),
    way("pp2-dist+overlap-fp16 behind", *_OVERFLOWED),
    way("ep2do2-dist-fp16 alltoall, behind", _ALLTOALL, *_OVERFLOWED),
)
CONFIGURATIONS = WAYS
DIAGONAL = tuple((way, "middle") for way in WAYS)
