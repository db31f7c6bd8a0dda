"""Ways of training beside the matrix: what else a ds_config or a script may ask for."""

from dataclasses import dataclass, field
from typing import Any

from matrix.deepspeed_plan import Configuration


@dataclass(frozen=True, kw_only=True)
class Way(Configuration):
    """A configuration of the matrix, with some things otherwise."""

    what: str
    args: tuple[str, ...] = ()
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    changes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.dtype} {self.what}"

    @property
    def script_args(self) -> list[str]:
        return [*super().script_args, *self.args]

    @property
    def ds_config(self) -> dict[str, Any]:
        config = super().ds_config
        config["zero_optimization"] |= self.zero
        return config | self.changes

    def has_phase(self, phase: str) -> bool:
        """Nobody sees a phase where the script reads a loader of its own."""
        return super().has_phase(phase) and (
            phase != "data" or _ULYSSES not in self.args
        )


def way(name: str, *args: str, zero: Any = None, **changes: Any) -> Way:
    """Return a way by its name, as it is printed."""
    kind, _, what = name.partition(" ")
    mode, _, dtype = kind.partition("-")
    return Way(mode, dtype, what=what, args=args, zero=zero or {}, changes=changes)


_ON_CPU = {"offload_optimizer": {"device": "cpu"}}
_ALL_ON_CPU = {**_ON_CPU, "offload_param": {"device": "cpu"}}
# DeepSpeed's own Adam for the CPU is compiled at its first use. Use it once before: a
# job that waits for the compiler is taken for one that hangs.
_TORCH_ADAM: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False}
_CPU_ADAM: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
_ROUND_ROBIN = {"round_robin_gradients": True}
_OVERLAP = {"overlap_comm": True}
_SCATTERED = {"contiguous_gradients": False}
_REENTRANT = "--checkpoint-blocks=reentrant"
_NOT_REENTRANT = "--checkpoint-blocks=not-reentrant"
_EXPERTS, _ULYSSES = "--expert-parts=2", "--sequence-parts=2"

WAYS = (
    way("zero1-bf16 offload", zero=_ON_CPU, **_TORCH_ADAM),
    way("zero2-bf16 offload", zero=_ON_CPU, **_TORCH_ADAM),
    way("zero3-bf16 offload", zero=_ON_CPU, **_TORCH_ADAM),
    way("zero3-bf16 offload all", zero=_ALL_ON_CPU, **_TORCH_ADAM),
    way("zero2-fp32 cpu adam", zero=_ON_CPU, **_CPU_ADAM),
    way("zero3-bf16 cpu adam", zero=_ON_CPU, **_CPU_ADAM),
    way("zero3-bf16 born sharded", "--zero-init", "--freeze-blocks"),
    # Together where they do not touch: the micro-batches of a step (1 and 3, else 2),
    # activation checkpointing by hand, and how gradients are reduced.
    way("zero0-bf16 reentrant, 1", _REENTRANT, gradient_accumulation_steps=1),
    way("zero0-fp32 not, 3", _NOT_REENTRANT, gradient_accumulation_steps=3),
    way("zero1-fp32 round robin, 1", zero=_ROUND_ROBIN, gradient_accumulation_steps=1),
    way("zero1-fp32 scattered, 3", zero=_SCATTERED, gradient_accumulation_steps=3),
    way(
        "zero2-bf16 round robin, reentrant, 3",
        _REENTRANT,
        zero=_ROUND_ROBIN,
        gradient_accumulation_steps=3,
    ),
    way(
        "zero2-fp32 overlap, not, 1",
        _NOT_REENTRANT,
        zero=_OVERLAP,
        gradient_accumulation_steps=1,
    ),
    way("zero2-bf16 scattered", zero=_SCATTERED),
    way(
        "zero3-bf16 overlap, reentrant, 3",
        _REENTRANT,
        zero=_OVERLAP,
        gradient_accumulation_steps=3,
    ),
    way(
        "zero3-fp32 scattered, not, 1",
        _NOT_REENTRANT,
        zero=_SCATTERED,
        gradient_accumulation_steps=1,
    ),
    way("zero0-fp32 experts", _EXPERTS),
    way("zero0-bf16 experts", _EXPERTS),
    way("zero1-fp32 experts", _EXPERTS),
    way("zero1-bf16 experts", _EXPERTS),
    way("zero2-bf16 experts", _EXPERTS),
    way("zero0-fp32 Ulysses", _ULYSSES),
    way("zero1-bf16 Ulysses", _ULYSSES),
    way("zero2-bf16 Ulysses", _ULYSSES),
    way("zero3-fp32 Ulysses", _ULYSSES),
)
CONFIGURATIONS = WAYS
DIAGONAL = tuple((way, "middle") for way in WAYS)
PHASES = ("data", "forward", "backward", "mid-optimizer", "gather")
