"""Megatron under the device proxy: what it takes that a rank's device may be lost."""

from mnemosyne_plugin.adapters.lost_device import refuse
from mnemosyne_plugin.adapters.megatron.state import MegatronState
from mnemosyne_plugin.recovery.manager import Manager


def prepare(manager: Manager, state: MegatronState) -> None:
    """Have all in place by which a lost device can be mended.

    Raises ConfigError where this version cannot.
    """
    if not manager.has_device_proxy:
        return
    for chunk in state.chunks:
        config, ddp = chunk.config, chunk.ddp_config
        what_is_given = {
            "Megatron's experts": getattr(config, "num_moe_experts", None),
            "Megatron's fp16": getattr(config, "fp16", False),
            "Megatron's context parallelism": config.context_parallel_size > 1,
            "Megatron's interleaved pipelines": len(state.chunks) > 1,
            "several instances of Megatron's distributed optimizer": (
                ddp.num_distributed_optimizer_instances > 1
            ),
        }
        refuse(manager, what_is_given)
    state.keep_constants()
