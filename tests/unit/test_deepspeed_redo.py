"""A redone step leaves the engine as an undisturbed one: real DeepSpeed."""

import importlib
import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")

from mnemosyne_plugin.adapters.deepspeed.hooks import (  # noqa: E402
    EngineHooks,
    check_targets,
)
from mnemosyne_plugin.adapters.deepspeed.state import EngineState  # noqa: E402
from mnemosyne_plugin.adapters.deepspeed.support import check_supported  # noqa: E402
from mnemosyne_plugin.errors import ConfigError, StateMismatch  # noqa: E402
from mnemosyne_plugin.recovery.commit import Outcome  # noqa: E402

NUM_STEPS = 5


class FakeManager:
    """Says REDO once at each of the steps that the test names."""

    has_device_proxy = is_device_lost = is_ahead = False
    device_generation = 0

    def __init__(self, redone_steps: set[int]) -> None:
        self.has_failed = False
        self.version = 0
        self.left = set(redone_steps)

    @property
    def is_doomed(self) -> bool:
        return self.has_failed

    @property
    def horizon(self) -> int:
        return self.version

    def phase(self, name: str) -> None:
        pass

    def collect(self) -> None:
        pass

    def wait_for_device(self) -> None:
        pass

    def begin(self) -> Outcome:
        return Outcome.COMMIT

    def recover(self) -> Outcome:
        self.has_failed = False
        return Outcome.REDO

    def commit(self) -> Outcome:
        if self.version in self.left:
            self.left.remove(self.version)
            return Outcome.REDO
        return Outcome.COMMIT

    def end(self) -> Outcome:
        self.version += 1
        return Outcome.COMMIT


class Model(torch.nn.Module):
    """Returns its loss, or its logits where the criterion is the user's."""

    def __init__(self, precision: str, criterion: str) -> None:
        super().__init__()
        # Batch norm mutates buffers in forward; it has no mixed bf16 kernel.
        norm = torch.nn.BatchNorm1d if precision == "fp32" else torch.nn.LayerNorm
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            norm(16),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 4),
        )
        self.has_criterion = criterion == "inside"

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = self.layers(x)
        return loss_of(out, y, 1.0) if self.has_criterion else out


def loss_of(out: torch.Tensor, y: torch.Tensor, noise: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(out.float(), y) * noise


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        # Without its shared-memory op, which takes a compiler and a minute.
        backend = importlib.import_module("deepspeed.comm.torch")
        patch.setattr(backend, "build_shm_op", lambda: None)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def engine_of(precision: str, criterion: str, manager: FakeManager) -> Any:
    torch.manual_seed(1)
    model = Model(precision, criterion)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    check_targets(engine)
    check_supported(engine)
    hooks = EngineHooks(engine, EngineState(engine), manager)  # type: ignore[arg-type]
    hooks.install()
    return engine


def train(
    precision: str,
    criterion: str,
    redone_steps: set[int],
    poison: float = 0.0,
    spoiled_forward: int | None = None,
) -> list[torch.Tensor]:
    """Return all state after a few steps, and the next random numbers.

    poison: added to the loss's factor in step 1; infinity makes the gradient overflow.
    spoiled_forward: in this one a collective of the model fails, and gives zeros.
    """
    manager = FakeManager(redone_steps)
    engine = engine_of(precision, criterion, manager)
    forwards = itertools.count()

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        manager.has_failed = next(forwards) == spoiled_forward
        return output * 0 if manager.has_failed else output

    engine.module.register_forward_hook(spoil)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for step in range(NUM_STEPS):
        for _ in range(2):
            x, y = torch.randn(6, 8).to(dtype), torch.randint(0, 4, (6,))
            loss = engine(x, y)
            if criterion == "outside":
                loss = loss_of(loss, y, torch.rand(()) + (poison if step == 1 else 0))
            engine.backward(loss)
            engine.step()
    assert manager.version == engine.global_steps == NUM_STEPS
    assert not manager.left
    tensors = [tensor.clone() for tensor in EngineState(engine).tensors().values()]
    return [*tensors, torch.tensor(engine.micro_steps), torch.rand(4)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("criterion", ["inside", "outside"])
def test_redone_steps_give_the_same_state(precision: str, criterion: str) -> None:
    healthy = train(precision, criterion, set())
    redone = train(precision, criterion, {0, 2, 3})
    assert len(healthy) == len(redone)
    assert all(torch.equal(a, b) for a, b in zip(healthy, redone, strict=True))


def test_a_step_that_overflowed_can_be_redone_too() -> None:
    infinite = float("inf")
    healthy = train("bf16", "outside", set(), poison=infinite)
    redone = train("bf16", "outside", {1}, poison=infinite)
    assert all(torch.equal(a, b) for a, b in zip(healthy, redone, strict=True))


@pytest.mark.parametrize("number", [2, 3])
def test_what_a_failure_spoils_in_forward_does_not_reach_the_script(
    number: int,
) -> None:
    healthy = train("fp32", "outside", set())
    spoiled = train("fp32", "outside", set(), spoiled_forward=number)
    assert all(torch.equal(a, b) for a, b in zip(healthy, spoiled, strict=True))


@pytest.mark.parametrize(
    "attributes",
    [
        {"mpu": object()},
        {"optimizer": None},
        {"_autoep_folding_spec": object()},
        {"has_moe_layers": True, "pipeline_parallelism": True},
        {"zenflow": True},
        {"zero_hpz_partition_size": lambda: 2},
        {"zero_quantized_gradients": lambda: True},
        {"zero_offload_param": lambda: SimpleNamespace(device="nvme")},
        # As with an optimizer that is derived from one of ZeRO's.
        {"zero_optimization": lambda: True},
    ],
    ids=", ".join,
)
def test_what_is_not_protected_is_refused(attributes: dict[str, Any]) -> None:
    engine = engine_of("fp32", "inside", FakeManager(set()))
    vars(engine).update(attributes)
    with pytest.raises(ConfigError):
        check_supported(engine)


def test_inputs_that_were_changed_in_place_make_a_redo_an_error() -> None:
    engine = engine_of("fp32", "inside", FakeManager({0}))
    x, y = torch.randn(6, 8), torch.randint(0, 4, (6,))
    for _ in range(2):
        engine.backward(engine(x, y))
        x.zero_()
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    with pytest.raises(StateMismatch) as caught:
        engine.step()
    assert caught.value.key == "inputs"
