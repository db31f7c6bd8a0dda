"""The state of a DeepSpeed engine with ZeRO stage 1, 2 or 3.

Each rank owns a shard of the fp32 masters and of the optimizer's moments. Parameters
follow from the masters of all ranks, so they need no copies: only frozen ones are
replicated state (at stage 3 they are sharded as well).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from mnemosyne_plugin.adapters.deepspeed.state import EngineScalars
from mnemosyne_plugin.adapters.lost_device import Copies
from mnemosyne_plugin.errors import ConfigError, StateMismatch
from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.torch_state import (
    Buffers,
    Frozen,
    Tensors,
    allocate_state,
    check_manifest,
)

_ZERO = "deepspeed.runtime.zero."


class _Stage(Protocol):
    """What differs between DeepSpeed's optimizer classes."""

    def masters(self) -> list[torch.Tensor]:
        """Return the flat fp32 tensors of this rank, which the optimizer updates."""

    def reset(self) -> None:
        """Drop gradients, and all that an unwound step has left behind."""

    def rebuild(self) -> None:
        """Make the parameters from the masters of all ranks. Collective."""

    def before_gather(self, call: Callable[[], None]) -> None:
        """Have ``call`` called when a step is about to gather parameters."""


class _Stage12:
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._module = importlib.import_module(_ZERO + "stage_1_and_2")

    def masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = self._optimizer.single_partition_of_fp32_groups
        return masters

    def reset(self) -> None:
        optimizer = self._optimizer
        optimizer.micro_step_id = self._module.INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in gradients:
                gradients[group] = None
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear()
        optimizer._release_ipg_buffers()
        reduced = optimizer.params_already_reduced
        reduced[:] = [False] * len(reduced)
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        else:
            _drop_gradients(self.masters())
        _leave_backward(optimizer)

    def rebuild(self) -> None:
        self._optimizer.update_lp_params()
        for group in range(len(self._optimizer.bit16_groups)):
            self._optimizer._update_model_bit16_weights(group)

    def before_gather(self, call: Callable[[], None]) -> None:
        step = self._optimizer._optimizer_step
        last = len(self._optimizer.bit16_groups) - 1

        def wrapper(group: int) -> None:
            step(group)
            if group == last:
                call()

        self._optimizer._optimizer_step = wrapper


class _Stage3:
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._module = importlib.import_module(_ZERO + "parameter_offload")
        self._names: list[tuple[str, str]] = []

    def masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = self._optimizer.fp32_partitioned_groups_flat
        return masters

    def reset(self) -> None:
        optimizer = self._optimizer
        del self._module.FWD_MODULE_STACK[1:]  # the first is the whole model
        optimizer.parameter_offload.release_backward_leftovers()
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        coordinator.hierarchy = 0
        self.register(self._names)
        # A newcomer has no trace of the order in which modules run, so it gathers
        # parameters one by one. All have to, until all have recorded it again.
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        optimizer.zero_grad(set_to_none=True)
        optimizer.averaged_gradients = {}
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        for parameter in optimizer.params_already_reduced:
            optimizer.params_already_reduced[parameter] = False
        for group in optimizer.optimizer.param_groups:
            group["params"] = []
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        else:
            _drop_gradients(self.masters())
        _leave_backward(optimizer)

    def registered(self) -> list[tuple[str, str]]:
        """Return (module, parameter) for all that modules use of other modules.

        DeepSpeed learns that in the first forward, which a newcomer has not made; what
        is gathered, and in which order, depends on it.
        """
        model = self._optimizer.parameter_offload.module
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [
            (name, names[key])
            for name, module in model.named_modules()
            for key in getattr(module, "_external_params", {})
        ]
        return self._names

    def register(self, names: list[tuple[str, str]]) -> None:
        """Know of just these."""
        self._names = names
        model = self._optimizer.parameter_offload.module
        modules, parameters = (
            dict(model.named_modules()),
            dict(model.named_parameters()),
        )
        for module in modules.values():
            if hasattr(module, "_external_params"):
                module._external_params = {}
        register = importlib.import_module(
            _ZERO + "partition_parameters"
        ).register_external_parameter
        for owner, name in names:
            register(modules[owner], parameters[name])

    def rebuild(self) -> None:
        optimizer = self._optimizer
        # Not in `reset`, which may follow: small ones stay whole from here on.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            parameters = optimizer.persistent_parameters
            parameters[0].all_gather(parameters)

    def before_gather(self, call: Callable[[], None]) -> None:
        post_step = self._optimizer._post_step

        def wrapper(*args: Any) -> None:
            call()
            post_step(*args)

        self._optimizer._post_step = wrapper


class _Bf16:
    """Stage 1 with bf16 parameters and fp32 gradients."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = self._optimizer.fp32_groups_flat_partition
        return masters

    def reset(self) -> None:
        self._optimizer.clear_hp_grads()
        self._optimizer.clear_lp_grads()
        _leave_backward(self._optimizer)

    def rebuild(self) -> None:
        self._optimizer.update_lp_params()

    def before_gather(self, call: Callable[[], None]) -> None:
        update = self._optimizer.update_lp_params

        def wrapper() -> None:
            call()
            update()

        self._optimizer.update_lp_params = wrapper


STAGES: dict[str, Callable[[Any], _Stage]] = {
    "DeepSpeedZeroOptimizer": _Stage12,
    "DeepSpeedZeroOptimizer_Stage3": _Stage3,
    "BF16_Optimizer": _Bf16,
}


class ZeroState:
    """Implements Shard for an engine, and TrainingState for what is replicated."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.stage = STAGES[type(engine.optimizer).__name__](engine.optimizer)
        self.optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self._groups = self.optimizer.param_groups
        self.buffers = Buffers(engine.module)
        self.rewind = self.buffers.rewind
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        owners = {} if scaler is None else {"scale": scaler}
        self.engine_scalars = EngineScalars(engine, owners)
        optimized = {id(p) for p in _optimized(engine.optimizer)}
        self._frozen: Tensors = {}
        self._frozen_copies: Copies | None = None
        self._frozen_shards: Tensors = {}
        for name, parameter in engine.module.named_parameters():
            if id(parameter) in optimized:
                continue
            mine = getattr(parameter, "ds_tensor", parameter)
            # Ranks of another stage of a pipeline have other parameters or experts.
            is_own = engine.pipeline_parallelism or engine.has_moe_layers
            if mine is not parameter or is_own:
                self._frozen_shards[f"frozen/{name}"] = mine.data
            else:
                self._frozen[f"parameter/{name}"] = parameter.data

    # --- TrainingState: what every rank has --------------------------------------

    def replicated(self) -> Frozen:
        """Return the part of the state that every rank has."""
        return Frozen(self._frozen, self.rewind)

    # --- Shard: what only this rank has --------------------------------------------

    def tensors(self) -> Tensors:
        tensors = dict(self._frozen_shards)
        for name, buffer in self._engine.module.named_buffers():
            tensors[f"buffer/{name}"] = buffer
        for number, master in enumerate(self.stage.masters()):
            tensors[f"master/{number}"] = master.data
            for name, value in self._state_of(master).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{number}/{name}"] = value
        return tensors

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        masters = self.stage.masters()
        wanted = {entry.key: entry for entry in manifest}
        for key in self.tensors().keys() - wanted.keys():
            if key.startswith("optimizer/"):  # made since, by the first step
                _, number, name = key.split("/", 2)
                del self.optimizer.state[masters[int(number)]][name]
                # DeepSpeed links parameters to the moments when they are made.
                self._engine.optimizer._hp_optimizer_states_linked = False
        present = self.tensors()
        for entry in manifest:
            kind, _, place = entry.key.partition("/")
            number, _, name = place.partition("/")
            if entry.key in present or kind != "optimizer":
                continue
            if int(number) >= len(masters):
                continue  # check_manifest says so
            master = masters[int(number)]
            self.optimizer.state[master][name] = allocate_state(entry, master)
        tensors = self.tensors()
        check_manifest(tensors, manifest)
        return tensors

    def scalars(self) -> dict[str, Any]:
        stage = self.stage
        return {
            "registered": stage.registered() if isinstance(stage, _Stage3) else [],
            "engine": self.engine_scalars.at_begin(),
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in self._groups
            ],
            "state": [
                {k: v for k, v in self._state_of(master).items() if not _is_tensor(v)}
                for master in self.stage.masters()
            ],
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        if len(scalars["groups"]) != len(self._groups):
            raise StateMismatch("another number of parameter groups", key="optimizer")
        self.buffers.end()  # they are tensors of the shard, and in place by now
        self.engine_scalars.load(scalars["engine"])
        if isinstance(self.stage, _Stage3):
            self.stage.register(scalars["registered"])
        for group, values in zip(self._groups, scalars["groups"], strict=True):
            group.update(values)
        for master, state in zip(self.stage.masters(), scalars["state"], strict=True):
            if state:
                self.optimizer.state[master].update(state)

    def keep_frozen(self) -> None:
        """Keep copies of what nothing changes: a device may be lost with it."""
        self._frozen_copies = Copies(self._frozen)

    def rebuild(self) -> None:
        if self._frozen_copies is not None:
            self._frozen_copies.put_back()
        self.reset()
        with torch.no_grad():
            self.stage.rebuild()

    # --- for the hooks ---------------------------------------------------------------

    def loaded(self) -> None:
        """A checkpoint was loaded; torch's optimizer has other groups after that."""
        self._groups = self.optimizer.param_groups
        if self._frozen_copies is not None:
            self.keep_frozen()

    def reset(self) -> None:
        """Drop what an unwound step has left in the optimizer."""
        # A stage 1 or 2 optimizer hides all groups but one while it steps that one.
        self.optimizer.param_groups = self._groups
        self.stage.reset()

    def _state_of(self, master: torch.Tensor) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.optimizer.state.get(master, {})
        return state


def _optimized(optimizer: Any) -> list[torch.nn.Parameter]:
    """Return the model's parameters that the optimizer updates."""
    for name in ("fp16_groups", "bit16_groups", "bf16_groups"):
        if hasattr(optimizer, name):
            return [p for group in getattr(optimizer, name) for p in group]
    raise ConfigError(f"{type(optimizer).__name__} has no parameter groups we know")


def _drop_gradients(masters: list[torch.Tensor]) -> None:
    for master in masters:
        master.grad = None


def _leave_backward(optimizer: Any) -> None:
    """Forget that a backward pass was under way."""
    optimizer._epilogue_ran_this_backward = False
    optimizer._backward_active_depth = 0
    optimizer.clear_backward_seen_flag()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
