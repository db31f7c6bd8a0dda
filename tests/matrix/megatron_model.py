"""The GPT of the matrix's Megatron scripts, divided as the arguments say."""

import argparse
import copy
from typing import Any

import cpu_cuda
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY, LENGTH, NUM_EXPERTS = 64, 8, 4


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    dtype = DTYPES[args.dtype]
    return TransformerConfig(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=args.tensor,
        pipeline_model_parallel_size=args.pipeline,
        virtual_pipeline_model_parallel_size=args.virtual or None,
        context_parallel_size=args.context,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=args.dtype == "bf16",
        fp16=args.dtype == "fp16",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Two sends between the same pair in one batch would cross.
        batch_p2p_comm=not args.virtual,
        overlap_p2p_comm=bool(args.virtual),
        **(expert_config(args) if args.dispatcher else {}),
    )


def expert_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a mixture of experts adds; its routers count, in various ways."""
    config: dict[str, Any] = {
        "num_moe_experts": NUM_EXPERTS,
        "expert_model_parallel_size": args.expert,
        "moe_token_dispatcher_type": args.dispatcher,
        "moe_router_topk": 2,
        "moe_z_loss_coeff": 1e-3,
        "moe_shared_expert_intermediate_size": 16,
        "moe_shared_expert_overlap": args.dispatcher == "alltoall",
        "add_bias_linear": False,
    }
    if args.expert_bias:
        return config | {
            "moe_router_enable_expert_bias": True,
            "moe_router_score_function": "sigmoid",
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-2,
        }
    return config | {
        "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-2, 1e-2],
    }


def build_chunks(args: argparse.Namespace, config: TransformerConfig) -> list[Any]:
    overlaps = args.overlap
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=args.distributed_optimizer,
        num_distributed_optimizer_instances=args.instances,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps and args.distributed_optimizer,
        grad_reduce_in_fp32=True,
        bucket_size=2000,
    )
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    if args.dispatcher:
        cpu_cuda.have_experts()
    if args.context > 1:
        spec.submodules.self_attention.submodules.core_attention = WholeSequence
    chunks = []
    for stage in range(args.virtual) if args.virtual else [None]:
        place = {"ignore_virtual": False, "vp_stage": stage}
        model: Any = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            share_embeddings_and_output_weights=True,
            vp_stage=stage,
        )
        if args.dtype != "fp32":
            model = Float16Module(config, model)
        chunk = DistributedDataParallel(config, ddp_config, model)
        chunk.broadcast_params()
        chunks.append(chunk)
    return chunks


class WholeSequence(DotProductAttention):
    """Attention of a part of a sequence to all of it, which the ranks gather.

    Megatron's own, in Transformer Engine, is for GPUs only.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        size = config.context_parallel_size
        # Rank i has the i-th part from the front and the i-th from the back.
        order = [part for i in range(size) for part in (i, 2 * size - 1 - i)]
        self._places = [order.index(part) for part in range(2 * size)]

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kw: Any) -> Any:
        return super().forward(query, self._all(key), self._all(value), *args, **kw)

    def _all(self, part: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        gathered = gather_from_sequence_parallel_region(part, group=group)
        parts = gathered.chunk(len(self._places))
        return torch.cat([parts[place] for place in self._places])
