"""Which DeepSpeed engines this version protects: the others are refused at start."""

from typing import Any

import torch

from mnemosyne_plugin.adapters.deepspeed.state import torch_optimizer
from mnemosyne_plugin.adapters.deepspeed.zero import STAGES
from mnemosyne_plugin.adapters.lost_device import refuse
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.recovery.manager import Manager

# Where DeepSpeed's optimizers keep their fp32 copies of parameters.
_MASTERS = (
    "fp32_groups",
    "fp32_groups_flat_partition",
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
)


def check_supported(engine: Any) -> None:
    """Raise ConfigError unless this kind of engine is protected by this version."""
    is_pipeline, has_experts = engine.pipeline_parallelism, engine.has_moe_layers
    is_managed = engine.managed_gradient_accumulation()
    is_known_zero = type(engine.optimizer).__name__ in STAGES
    # By DeepSpeed's own mark: the units for Ulysses alone, without tensor parallelism.
    is_ulysses = hasattr(engine.mpu, "initialize_sequence_parallel")
    is_known_mpu = engine.mpu is None or is_pipeline or is_ulysses
    offloads = engine.zero_offload_optimizer(), engine.zero_offload_param()
    is_on_disk = any(o is not None and o.device == "nvme" for o in offloads)
    # A second copy of the parameters, and what is rounded on its way.
    is_zero_pp = (
        engine.zero_hpz_partition_size() > 1
        or engine.zero_quantized_weights()
        or engine.zero_quantized_gradients()
    )
    reasons = {
        "no optimizer": engine.optimizer is None,
        "a loss scaler of torch.autocast": bool(engine.torch_autocast_z0_gradscaler),
        "mixture of experts in a pipeline": has_experts and is_pipeline,
        "experts that DeepSpeed has split (AutoEP)": engine._autoep_folding_spec,
        "managed_gradient_accumulation=false": not is_managed,
        "a model-parallel unit (mpu)": not is_known_mpu,
        "offload to NVMe": is_on_disk,
        "ZeRO++": is_zero_pp,
        "ZenFlow": engine.zenflow,
        "this kind of ZeRO optimizer": engine.zero_optimization() and not is_known_zero,
    }
    for reason, is_given in reasons.items():
        if is_given:
            raise ConfigError(
                f"mnemosyne cannot protect {reason} yet; set mnemosyne.enabled to "
                "false to run unprotected"
            )
    optimizer = torch_optimizer(engine)
    is_wrapped = optimizer is not engine.optimizer
    # torch marks the step functions that run its hooks; our vote is one of them.
    is_hooked = getattr(type(optimizer).step, "hooked", False)
    is_known = not is_wrapped or any(
        hasattr(engine.optimizer, name) for name in _MASTERS
    )
    if not (isinstance(optimizer, torch.optim.Optimizer) and is_hooked and is_known):
        raise ConfigError(
            f"mnemosyne cannot protect the optimizer {type(engine.optimizer).__name__} "
            "yet; use one of torch.optim"
        )


def refuse_with_device_proxy(engine: Any, manager: Manager) -> None:
    """Raise ConfigError where this kind of engine cannot lose its device."""
    offloads = engine.zero_offload_optimizer(), engine.zero_offload_param()
    what_is_given = {
        "a pipeline of DeepSpeed": engine.pipeline_parallelism,
        "DeepSpeed's experts": engine.has_moe_layers,
        "ZeRO 3": engine.zero_optimization_stage() > 2,
        "ZeRO's offload": any(o is not None and o.device != "none" for o in offloads),
    }
    refuse(manager, what_is_given)
