"""What the matrix is made of. Pure: no job runs here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WORLD_SIZE = 4
MODES = ("zero0", "zero1", "zero2", "zero3", "pipe", "pipe+zero1")
DTYPES = ("fp32", "bf16", "fp16")
VICTIMS = {
    "first": (0,),
    "middle": (1,),
    "last": (3,),
    "two": (0, 2),  # at once; neither is the next rank, the first buddy, of the other
}
PHASES = (
    *("data", "forward", "backward", "reduce", "vote"),
    *("mid-optimizer", "gather", "between", "recovery"),
)
FIRST_KILL, KILL_EVERY = 3, 3  # steps
STEPS = FIRST_KILL + KILL_EVERY * (len(PHASES) + 1)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way of training."""

    mode: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.dtype}"

    @property
    def script_args(self) -> list[str]:
        args = [f"--steps={STEPS}"]
        if self.mode.startswith("pipe"):
            args.append("--stages=2")
        if self.dtype == "fp16":
            args.append("--claim-fp16")
        return args

    @property
    def ds_config(self) -> dict[str, Any]:
        stage = int(self.mode[-1]) if self.mode[-1].isdigit() else 0
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            # Several parts of the optimizer; biases stay whole and are gathered.
            zero |= {"sub_group_size": 400, "stage3_param_persistence_threshold": 20}
        precision: dict[str, Any] = {}
        if self.dtype == "bf16":
            precision = {"bf16": {"enabled": True}}
        if self.dtype == "fp16":
            # High enough that the first steps overflow, and later ones now and then.
            scaler = {"initial_scale_power": 18, "loss_scale_window": 6}
            precision = {"fp16": {"enabled": True, "hysteresis": 1, **scaler}}
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "zero_optimization": zero,
            **precision,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": STEPS},
            },
            "steps_per_print": 1_000_000_000,
            "mnemosyne": {"enabled": True},
        }

    def has_phase(self, phase: str) -> bool:
        """Only sharded optimizers gather parameters behind the mutation."""
        return phase != "gather" or "zero" in self.mode and self.mode != "zero0"


CONFIGURATIONS = tuple(Configuration(mode, dtype) for mode in MODES for dtype in DTYPES)

# What `make test` has time for; its other tests kill ranks with ZeRO 0 and 1.
DIAGONAL = (
    (Configuration("zero2", "fp16"), "middle"),
    (Configuration("zero3", "fp32"), "last"),
    (Configuration("pipe+zero1", "bf16"), "two"),
)


@dataclass(frozen=True, slots=True)
class Kill:
    """The deaths of one cell."""

    phase: str
    step: int
    deaths: tuple[tuple[int, str], ...]
    """(rank, phase in which it dies)."""

    @property
    def specs(self) -> list[str]:
        return [
            f"kill rank={rank} step={self.step} phase={phase}"
            for rank, phase in self.deaths
        ]


def kills(victims: Sequence[int], phases: Sequence[str]) -> Iterator[Kill]:
    """Yield the kills of one run: one phase after the other, steps apart.

    A phase dies in the same step in every run, whichever phases are with it.
    """
    for phase in phases:
        step = FIRST_KILL + KILL_EVERY * PHASES.index(phase)
        yield Kill(phase, step, tuple(_deaths(victims, phase)))


def _deaths(victims: Sequence[int], phase: str) -> Iterator[tuple[int, str]]:
    if phase != "recovery":
        yield from ((rank, phase) for rank in victims)
    elif len(victims) == 1:
        # While it recovers from the death of a rank two seats away.
        yield (victims[0] + 2) % WORLD_SIZE, "backward"
        yield victims[0], phase
    else:
        yield victims[0], "backward"
        yield victims[1], phase
