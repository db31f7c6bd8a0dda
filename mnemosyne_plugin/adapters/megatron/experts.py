"""What Megatron's mixtures of experts keep besides parameters and buffers."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from mnemosyne_plugin.state.rng import add_rng

_MOE = "megatron.core.transformer.moe."


# What a shared expert that overlaps with the exchange hands from call to call.
_HANDED_ON = (
    *("cached_fc1_input", "cached_fc2_input", "cached_fc2_output", "cached_output"),
    "gate_score",
)


def keep(model: torch.nn.Module) -> None:
    """Have it remembered and put back with the random state of a step.

    Routers sum up their auxiliary losses until the loop logs them. A step that is made
    again must not add its own twice; what was logged must not come back.
    """
    for module in model.modules():
        # A router's bias is fp32 from its first forward on, whatever the model is. A
        # newcomer takes it over in front of that.
        settle = getattr(module, "_maintain_float32_expert_bias", None)
        if settle is not None:
            settle()
    add_rng("megatron auxiliary losses", Sums.capture, Sums.restore)


def drop(model: torch.nn.Module) -> None:
    """Drop what an unwound forward has left half done, which the next would refuse."""
    for module in model.modules():
        if hasattr(module, "cached_fc1_input"):
            for name in _HANDED_ON:
                setattr(module, name, None)


class Sums:
    """Auxiliary losses that are not logged yet, of each layer, by their names."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values = values

    @classmethod
    def capture(cls) -> "Sums":
        """Return copies, on their own device: nobody waits for it."""
        return cls({name: value.clone() for name, value in _live({}).items()})

    def restore(self) -> None:
        """Put them back, here or in another process."""
        for name, live in _live(self._values).items():
            value = self._values.get(name)
            live.zero_() if value is None else live.copy_(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sums) or self._values.keys() != other._values.keys():
            return False
        return all(torch.equal(v, other._values[n]) for n, v in self._values.items())


def _live(wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what Megatron adds to, with sums of the names of ``wanted``."""
    logging: Any = sys.modules.get(_MOE + "moe_logging")
    if logging is None:  # before 0.18
        utils: Any = sys.modules[_MOE + "moe_utils"]
        table = utils.get_moe_layer_wise_logging_tracker()
        for name, value in wanted.items():
            table.setdefault(name, {"values": torch.zeros_like(value)})
        return {name: entry["values"] for name, entry in table.items()}
    tracker = logging.get_moe_metrics_tracker()
    for name, value in wanted.items():
        tracker.ensure_initialized(name, len(value), value.device)
    return {name: entry.values for name, entry in tracker.metrics.items()}
