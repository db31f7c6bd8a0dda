"""The state of Megatron's model chunks and optimizers.

All of it is a shard: other ranks have other layers, other parts of them, or other parts
of the optimizer. Parameters that follow from fp32 masters need no copies.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from mnemosyne_plugin.adapters.megatron import experts, nvidia
from mnemosyne_plugin.adapters.megatron.constants import Constants
from mnemosyne_plugin.errors import ConfigError, StateMismatch
from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.rng import add_rng
from mnemosyne_plugin.state.torch_state import (
    Buffers,
    Tensors,
    allocate_optimizer,
    check_manifest,
    load_optimizer_scalars,
    optimizer_scalars,
    optimizer_tensors,
)

_KNOWN = {
    "FP32Optimizer": (),
    # Parameters that it copies from fp32 masters.
    "Float16OptimizerWithFloat16Params": ("float16_groups",),
    # Parameters that are gathered from the masters of all ranks.
    "DistributedOptimizer": ("model_float16_groups", "model_fp32_groups"),
}
# From 0.19 on an optimizer asks all ranks a question once, and keeps the answers here.
_ASKED = "_has_grad_norm_group_cache"


class Counters(Protocol):
    """What the training loop counts outside of model and optimizer."""

    def values(self) -> Any:
        """Return it. Picklable."""

    def load(self, values: Any) -> None:
        """Take what ``values`` returned."""


class MegatronState:
    """Implements Shard, and StepState, for the chunks of one rank."""

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        counters: Counters | None = None,
    ) -> None:
        """chunks: Megatron's DistributedDataParallel modules, as many as the rank has.

        scheduler: anything with ``state_dict`` and ``load_state_dict``, or None.
        """
        self.chunks = tuple(chunks)
        self.optimizers = _parts(optimizer)
        self.optimizer = optimizer
        # A part without parameters has one too, and scales the loss by it.
        scalers = (getattr(part, "grad_scaler", None) for part in _chain(optimizer))
        self._scalers = [scaler for scaler in scalers if scaler is not None]
        self._askers = [optimizer, *(o for o in self.optimizers if o is not optimizer)]
        self.scheduler = scheduler
        self._counters = counters
        self._marked: dict[str, Any] | None = None
        self._constants: Constants | None = None
        _check_supported(self.chunks, self.optimizers)
        self._groups = [
            group for chunk in self.chunks for group in bucket_groups(chunk)
        ]
        self._model = torch.nn.ModuleList(self.chunks)
        self.buffers = Buffers(self._model)
        self.rewind = self.buffers.rewind
        derived = {id(p) for o in self.optimizers for p in _derived(o)}
        self._own = {
            f"parameter/{name}": parameter
            for name, parameter in self._model.named_parameters()
            if id(parameter) not in derived
        }
        add_rng("megatron", _tracker_states, _set_tracker_states)
        self._has_experts = any(
            getattr(chunk.config, "num_moe_experts", None) for chunk in self.chunks
        )
        if self._has_experts:
            experts.keep(self._model)

    def keep_constants(self) -> None:
        """From now on keep what a lost device would take and a newcomer would make."""
        owners = [*_chain(self.optimizer), *self._scalers]
        self._constants = Constants(self._model, owners)

    # --- Shard --------------------------------------------------------------------

    def tensors(self) -> Tensors:
        tensors: Tensors = {name: p.data for name, p in self._own.items()}
        for name, buffer in self._model.named_buffers():
            tensors[f"buffer/{name}"] = buffer
        own = {id(parameter) for parameter in self._own.values()}
        for number, part in enumerate(self.optimizers):
            for place, group in enumerate(part.optimizer.param_groups):
                for index, master in enumerate(group["params"]):
                    if id(master) not in own:
                        key = f"master/{number}/{place}/{index}"
                        tensors[key] = master.data
            for key, tensor in optimizer_tensors(part.optimizer).items():
                tensors[f"{number}/{key}"] = tensor
        return tensors

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        for number, part in enumerate(self.optimizers):
            prefix = f"{number}/"
            entries = [
                replace(entry, key=entry.key.removeprefix(prefix))
                for entry in manifest
                if entry.key.startswith(prefix)
            ]
            allocate_optimizer(part.optimizer, entries)
        tensors = self.tensors()
        check_manifest(tensors, manifest)
        return tensors

    def scalars(self) -> dict[str, Any]:
        values = {
            "optimizers": [optimizer_scalars(p.optimizer) for p in self.optimizers],
            "scalers": [scaler.state_dict() for scaler in self._scalers],
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "buckets": [_progress(group) for group in self._groups],
            "asked": [getattr(o, _ASKED, None) for o in self._askers],
            "counters": self._counters.values() if self._counters is not None else None,
        }
        return copy.deepcopy(values)

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        if len(scalars["buckets"]) != len(self._groups):
            raise StateMismatch("another number of gradient buckets", key="buckets")
        self.buffers.end()  # they are tensors of the shard, and in place by now
        self._marked = None
        self._set(scalars)

    def rebuild(self) -> None:
        if self._constants is not None:
            self._constants.put_back()
        self.undo()
        with torch.no_grad():
            for part in self.optimizers:
                if _derived(part):
                    part._copy_main_params_to_model_params()
            for chunk in self.chunks:
                if chunk.ddp_config.use_distributed_optimizer:
                    chunk.start_param_sync(force_sync=True)
        self.forget_gathers()

    # --- StepState ----------------------------------------------------------------

    def begin(self) -> None:
        self._marked = self.scalars()

    def end(self) -> None:
        self._marked = None
        if self._constants is not None:
            self._constants.keep()

    def undo(self) -> None:
        """Drop gradients and collectives of an unwound step, and what it counted."""
        progress = [_progress(group) for group in self._groups]
        for group in self._groups:
            group.grad_reduce_handle = None
            group.param_gather_handle = None
            group.param_gather_dispatched = False
            group.per_param_grad_ready_counts = {}
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._has_experts:
            experts.drop(self._model)
        for group, values in zip(self._groups, progress, strict=True):
            _set_progress(group, values)
        if self._marked is not None:
            self._set(self._marked)
        self._marked = None

    def forget_gathers(self) -> None:
        """Have the next forward gather parameters, where it does so at all."""
        for group in self._groups:
            group.param_gather_dispatched = False

    def _set(self, scalars: Mapping[str, Any]) -> None:
        scalars = copy.deepcopy(dict(scalars))
        for part, values in zip(self.optimizers, scalars["optimizers"], strict=True):
            load_optimizer_scalars(part.optimizer, values)
        for scaler, values in zip(self._scalers, scalars["scalers"], strict=True):
            scaler.load_state_dict(values)
        if self.scheduler:
            _load_scheduler(self.scheduler, scalars["scheduler"])
        for group, values in zip(self._groups, scalars["buckets"], strict=True):
            _set_progress(group, values)
        for asker, answers in zip(self._askers, scalars["asked"], strict=True):
            setattr(asker, _ASKED, answers)
        if self._counters is not None:
            self._counters.load(scalars["counters"])


def bucket_groups(chunk: Any) -> list[Any]:
    """Return what a chunk reduces and gathers together, in the order in which it does.

    Source: DistributedDataParallel of megatron.core 0.16 to 0.19.
    """
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _progress(group: Any) -> dict[str, Any]:
    """Return how far a bucket group is in learning when its gradients are complete.

    From its second step on it reduces as soon as they are, in another order than in
    the first: so a newcomer must know what the others know.
    """
    places = {id(p): i for i, p in enumerate(_parameters(group))}
    return {
        "is_first_batch": group.is_first_batch,
        "golden": _by_place(group.golden_per_param_grad_ready_counts, places),
        "counts": _by_place(group.per_param_grad_ready_counts, places),
    }


def _set_progress(group: Any, values: Mapping[str, Any]) -> None:
    parameters = _parameters(group)
    group.is_first_batch = values["is_first_batch"]
    group.golden_per_param_grad_ready_counts = {
        parameters[place]: count for place, count in values["golden"].items()
    }
    group.per_param_grad_ready_counts = {
        parameters[place]: count for place, count in values["counts"].items()
    }


def _parameters(group: Any) -> list[Any]:
    return [p for bucket in group.buckets for p in bucket.params_list]


def _by_place(counts: Mapping[Any, int], places: Mapping[int, int]) -> dict[int, int]:
    return {places[id(parameter)]: count for parameter, count in counts.items()}


def _chain(optimizer: Any) -> list[Any]:
    """Return the optimizers that a chain is made of."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _parts(optimizer: Any) -> list[Any]:
    """Return those of them that have parameters: frozen models have none."""
    parts = _chain(optimizer)
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _derived(part: Any) -> list[Any]:
    """Return the parameters that ``part`` makes from its masters."""
    names: Iterable[str] = _KNOWN[type(part).__name__]
    return [p for name in names for group in getattr(part, name) for p in group]


def _load_scheduler(scheduler: Any, values: Mapping[str, Any]) -> None:
    # OptimizerParamScheduler.load_state_dict steps from where it is to where it was,
    # and compares its configuration: these are the numbers that step changes.
    if hasattr(scheduler, "num_steps") and "num_steps" in values:
        scheduler.num_steps = values["num_steps"]
    else:
        scheduler.load_state_dict(values)


def _tracker_states() -> dict[str, bytes]:
    """Return the states of Megatron's generators, one per kind of parallelism."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().get_states()
    return {
        name: (s.get_state() if isinstance(s, torch.Generator) else s).numpy().tobytes()
        for name, s in states.items()
    }


def _set_tracker_states(states: Mapping[str, bytes]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    live = tracker.get_states()
    for name, state in states.items():
        tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        if isinstance(live.get(name), torch.Generator):
            live[name].set_state(tensor)
        else:
            live[name] = tensor
    tracker.set_states(live)


def _check_supported(chunks: Sequence[Any], parts: Sequence[Any]) -> None:
    """Raise ConfigError unless this version knows where all of the state is."""
    for part in parts:
        inner, name = part.optimizer, type(part).__name__
        config = part.config
        is_precise = getattr(config, "use_precision_aware_optimizer", False)
        # torch marks the step functions that run its hooks; our vote is one of them.
        is_hooked = getattr(type(inner).step, "hooked", False)
        if name not in _KNOWN or not is_hooked or is_precise:
            raise ConfigError(
                f"mnemosyne cannot protect {name} around {type(inner).__name__}"
                f"{' with a precision-aware optimizer' if is_precise else ''} yet; "
                f"known are {', '.join(_KNOWN)} around an optimizer of torch.optim"
            )
    for chunk in chunks:
        ddp = getattr(chunk, "ddp_config", None)
        if ddp is None or not hasattr(chunk, "bucket_groups"):
            raise ConfigError(
                f"mnemosyne protects Megatron's DistributedDataParallel, not a "
                f"{type(chunk).__name__}; wrap the model in it, or do not attach"
            )
        if getattr(ddp, "reuse_grad_buf_for_mxfp8_param_ag", False):
            raise ConfigError("mnemosyne cannot protect mxfp8 parameters yet")
        if getattr(chunk, "overlap_param_gather_with_optimizer_step", False):
            raise ConfigError(
                "mnemosyne cannot protect overlap_param_gather_with_optimizer_step yet"
            )
    nvidia.check(chunks)
