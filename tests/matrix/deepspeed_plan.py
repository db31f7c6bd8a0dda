"""The ways of training with DeepSpeed that the matrix has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matrix.plan import num_steps

MODES = ("zero0", "zero1", "zero2", "zero3", "pipe", "pipe+zero1")
DTYPES = ("fp32", "bf16", "fp16")
PHASES = (
    *("data", "forward", "backward", "reduce", "vote"),
    *("mid-optimizer", "gather", "between", "recovery"),
)
_STEPS = num_steps(PHASES)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way of training."""

    mode: str
    dtype: str

    script: ClassVar[Path] = Path(__file__).with_name("train.py")
    preload: ClassVar[tuple[str, ...]] = ("torch._dynamo", "deepspeed")
    world_size: ClassVar[int] = 4
    all_phases: ClassVar[tuple[str, ...]] = PHASES

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.dtype}"

    @property
    def script_args(self) -> list[str]:
        args = [f"--steps={_STEPS}"]
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
                "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": _STEPS},
            },
            "steps_per_print": 1_000_000_000,
            "mnemosyne": {"enabled": True},
        }

    def files(self, folder: Path) -> list[str]:
        """Write what the script reads; return the arguments that say where."""
        config = folder / "ds_config.json"
        config.write_text(json.dumps(self.ds_config, indent=2))
        return [f"--deepspeed_config={config}"]

    def has_phase(self, phase: str) -> bool:
        """Only sharded optimizers gather parameters behind the mutation."""
        return phase != "gather" or "zero" in self.mode and self.mode != "zero0"

    def nth(self, phase: str) -> int:
        return 1


CONFIGURATIONS = tuple(Configuration(mode, dtype) for mode in MODES for dtype in DTYPES)

# What `make test` has time for; its other tests kill ranks with ZeRO 0 and 1.
DIAGONAL = (
    (Configuration("zero2", "fp16"), "middle"),
    (Configuration("zero3", "fp32"), "last"),
    (Configuration("pipe+zero1", "bf16"), "two"),
)
