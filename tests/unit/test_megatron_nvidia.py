"""apex and Transformer Engine below Megatron: told, kept, or refused. By fakes."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mnemosyne_plugin.adapters.megatron import nvidia
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.state.manifest import describe
from mnemosyne_plugin.state.torch_state import (
    allocate_optimizer,
    load_optimizer_scalars,
    optimizer_scalars,
    optimizer_tensors,
)


class FusedAdam(torch.optim.Optimizer):
    """Counts its steps in the group, as those of apex and Transformer Engine do."""

    __module__ = "apex.optimizers.fused_adam"

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state, grad = self.state[parameter], parameter.grad
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(grad, 0.1)
                state["exp_avg_sq"].lerp_(grad * grad, 0.001)
                scale = group["lr"] / group["step"]
                rms = state["exp_avg_sq"].sqrt() + 1e-8
                parameter.data.addcdiv_(state["exp_avg"], rms, value=-scale)


def made(steps: int) -> FusedAdam:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(3))], {"lr": 0.1})
    for _ in range(steps):
        step(optimizer)
    return optimizer


def step(optimizer: FusedAdam) -> torch.Tensor:
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.arange(3.0) + parameter.data
    optimizer.step()
    return parameter.data


def chunk(parameter: Any = None, **config: Any) -> SimpleNamespace:
    parameters = {"weight": parameter}.items() if parameter is not None else ()
    return SimpleNamespace(
        config=SimpleNamespace(**config), named_parameters=lambda: parameters
    )


def test_a_fused_optimizer_goes_on_in_a_newcomer_where_it_was() -> None:
    lost, newcomer = made(steps=2), made(steps=0)
    tensors = optimizer_tensors(lost)
    (parameter,) = newcomer.param_groups[0]["params"]
    parameter.data.copy_(lost.param_groups[0]["params"][0])

    allocate_optimizer(newcomer, describe(tensors))
    for key, tensor in optimizer_tensors(newcomer).items():
        tensor.copy_(tensors[key])
    load_optimizer_scalars(newcomer, optimizer_scalars(lost))

    assert torch.equal(step(newcomer), step(lost))


def test_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [SimpleNamespace(optimizer=made(steps=0))]
    assert "no apex, no Transformer Engine; steps are made by apex" in nvidia.line(
        parts
    )

    for name in ("apex", "transformer_engine"):
        fake = ModuleType(name)
        fake.__version__ = "2.17"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, fake)
    line = nvidia.line(parts)
    assert "apex 2.17 and Transformer Engine 2.17" in line
    assert "apex's FusedAdam" in line


@pytest.mark.parametrize(
    "config",
    [
        {"fp8": "hybrid"},
        {"fp4": "e2m1"},
        {"tp_comm_overlap": True},
        {"moe_token_dispatcher_type": "flex"},
    ],
)
def test_what_we_do_not_see_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot protect"):
        nvidia.check([chunk(**config)])


def test_quantized_parameters_are_refused() -> None:
    quantized = type("Float8Tensor", (), {"__module__": "transformer_engine.pytorch"})
    with pytest.raises(ConfigError, match="weight is a Float8Tensor"):
        nvidia.check([chunk(SimpleNamespace(data=quantized()))])


def test_other_models_pass() -> None:
    alltoall = chunk(moe_token_dispatcher_type="alltoall", fp8=None)
    nvidia.check([chunk(torch.nn.Parameter(torch.ones(1))), alltoall])
