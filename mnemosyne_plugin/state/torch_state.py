"""Tensors and scalars of torch modules and optimizers, by stable keys.

The building blocks of every adapter's ``TrainingState``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from mnemosyne_plugin.errors import StateMismatch
from mnemosyne_plugin.state.manifest import Entry, describe, torch_dtype

Tensors = dict[str, torch.Tensor]


def module_tensors(module: torch.nn.Module) -> Tensors:
    """Return parameters and all buffers, the non-persistent ones too."""
    tensors: Tensors = {}
    for name, parameter in module.named_parameters():
        tensors[f"parameter/{name}"] = parameter.data
    for name, buffer in module.named_buffers():
        tensors[f"buffer/{name}"] = buffer
    return tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the state tensors of each parameter, keyed by group and position."""
    tensors: Tensors = {}
    for place, parameter in _parameters(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{place}/{name}"] = value
    return tensors


def allocate_state(entry: Entry, parameter: torch.Tensor) -> torch.Tensor:
    """Return a state tensor of an optimizer where its step would make it.

    Counters may be on the CPU where the parameter is not.
    """
    return torch.empty(
        entry.shape,
        dtype=torch_dtype(entry.dtype),
        device="cpu" if entry.device == "cpu" else parameter.device,
    )


def allocate_optimizer(
    optimizer: torch.optim.Optimizer, manifest: Sequence[Entry]
) -> None:
    """Make the state tensors that ``manifest`` names; what is there and fits stays."""
    parameters = dict(_parameters(optimizer))
    before = dict(optimizer.state)
    optimizer.state.clear()
    for entry in manifest:
        kind, _, rest = entry.key.partition("/")
        if kind != "optimizer":
            continue
        place, _, name = rest.rpartition("/")
        if place not in parameters:
            raise StateMismatch(
                f"replicas hold {entry.key}, this rank's optimizer has no such "
                "parameter; does the script build the same model on every rank?",
                key=entry.key,
            )
        parameter = parameters[place]
        value = before.get(parameter, {}).get(name)
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or describe({entry.key: value}) != (entry,):
            value = allocate_state(entry, parameter)
        optimizer.state[parameter][name] = value


def optimizer_scalars(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what is no tensor: hyper-parameters per group, other per-state values."""
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = {
        place: {
            name: value
            for name, value in optimizer.state.get(parameter, {}).items()
            if not isinstance(value, torch.Tensor)
        }
        for place, parameter in _parameters(optimizer)
    }
    return {"groups": groups, "state": {k: v for k, v in state.items() if v}}


def load_optimizer_scalars(
    optimizer: torch.optim.Optimizer, scalars: Mapping[str, Any]
) -> None:
    """Take what ``optimizer_scalars`` of a replica returned."""
    if len(scalars["groups"]) != len(optimizer.param_groups):
        raise StateMismatch(
            f"replicas have {len(scalars['groups'])} parameter groups, this rank has "
            f"{len(optimizer.param_groups)}",
            key="optimizer",
        )
    for group, values in zip(optimizer.param_groups, scalars["groups"], strict=True):
        group.update(values)
    parameters = dict(_parameters(optimizer))
    for place, values in scalars["state"].items():
        optimizer.state[parameters[place]].update(values)


def check_manifest(
    tensors: Mapping[str, torch.Tensor], manifest: Sequence[Entry]
) -> None:
    """Raise StateMismatch unless ``tensors`` are just what ``manifest`` says."""
    wanted = {entry.key: entry for entry in manifest}
    for key in wanted.keys() ^ tensors.keys():
        side = "only its replicas have" if key in wanted else "only this rank has"
        raise StateMismatch(f"newcomer differs: {side} {key}", key=key)
    for key, tensor in tensors.items():
        (got,) = describe({key: tensor})
        if got != wanted[key]:
            raise StateMismatch(
                f"newcomer differs at {key}: replicas have {wanted[key]}, this rank "
                f"has {got}",
                key=key,
            )


class Buffers:
    """The buffers that forward mutates, such as BatchNorm statistics.

    They differ between ranks, so they are local state. All buffers are copied at each
    step: the version counter does not tell which moved (torch's batch norm changes
    its statistics without it).
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._copies: Tensors = {}
        self._mutable: set[str] = set()
        self._is_in_step = False

    def begin(self) -> None:
        """Note the contents now, before the step's first forward."""
        for name, buffer in self._module.named_buffers():
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype:
                self._copies[name] = buffer.detach().clone()
            else:
                copy.copy_(buffer)
        self._is_in_step = True

    def rewind(self) -> None:
        """Within a step: put back the contents at its begin."""
        if self._is_in_step:
            self.load(self._copies)

    def end(self) -> None:
        """End the step; nothing is to be put back any more."""
        self._is_in_step = False

    def local(self) -> Tensors:
        """Return copies of the buffers that a step has been seen to mutate."""
        buffers = dict(self._module.named_buffers())
        for name in buffers.keys() - self._mutable:
            if not torch.equal(buffers[name], self._copies[name]):
                self._mutable.add(name)
        return {
            name: buffers[name].detach().to("cpu", copy=True)
            for name in sorted(self._mutable)
        }

    def load(self, contents: Tensors) -> None:
        """Copy ``contents`` into the buffers of these names."""
        with torch.no_grad():
            for name, buffer in self._module.named_buffers():
                if name in contents:
                    buffer.copy_(contents[name])

    def load_local(self, contents: Tensors) -> None:
        """On a newcomer: take what ``local`` of the lost worker returned."""
        self.load(contents)
        self._mutable.update(contents)
        if self._is_in_step:  # a lost device took the copies, too
            self.begin()


class Frozen:
    """Implements TrainingState for parameters that nothing changes."""

    def __init__(self, tensors: Tensors, rewind: Callable[[], None]) -> None:
        self._tensors = tensors
        self.rewind = rewind

    def tensors(self) -> Tensors:
        return self._tensors

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        check_manifest(self._tensors, manifest)
        return {entry.key: self._tensors[entry.key] for entry in manifest}

    def local(self) -> None:
        return None

    def load_local(self, local: Any) -> None:
        pass

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        pass


def _parameters(
    optimizer: torch.optim.Optimizer,
) -> Iterable[tuple[str, torch.Tensor]]:
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield f"{group_index}/{index}", parameter
