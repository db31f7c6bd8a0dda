"""Megatron under the device proxy: what it takes that a rank's device may be lost."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from mnemosyne_plugin.adapters.lost_device import refuse
from mnemosyne_plugin.adapters.megatron.state import MegatronState, bucket_groups
from mnemosyne_plugin.recovery.manager import Manager

_PARALLEL_STATE = "megatron.core.parallel_state"
_GROUPS = (
    *("get_tensor_model_parallel_group", "get_pipeline_model_parallel_group"),
    *("get_model_parallel_group", "get_embedding_group"),
    "get_position_embedding_group",
)


def prepare(manager: Manager, state: MegatronState) -> None:
    """Have all in place by which a lost device can be mended. Collective.

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
    _connect(state)


def _connect(state: MegatronState) -> None:
    """Have NCCL's communicators made that steps will use.

    torch makes one when a group is first used. A device that is lost while only some
    ranks have a communicator cannot be mended.
    """
    used: dict[int, Any] = {}
    for group in _groups(state):
        if group is not None and not dist.distributed_c10d._rank_not_in_group(group):
            used[id(group)] = group
    for group in used.values():
        # With one rank it concerns nobody else, and a step may do without.
        if dist.get_world_size(group) > 1:
            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    torch.cuda.synchronize()


def _groups(state: MegatronState) -> Iterator[Any]:
    """Yield them in the same order on all ranks, some again."""
    yield dist.group.WORLD
    parallel_state: Any = importlib.import_module(_PARALLEL_STATE)
    for name in _GROUPS:
        yield getattr(parallel_state, name)(check_initialized=False)
    yield parallel_state.get_data_parallel_group()
    for chunk in state.chunks:
        for group in bucket_groups(chunk):
            for name in (
                "data_parallel_group",
                "intra_distributed_optimizer_instance_group",
            ):
                yield getattr(group, name, None)
    for part in state.optimizers:
        yield part.get_grad_stats_parallel_group()
