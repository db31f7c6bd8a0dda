"""Trains a small model with the engine's hooks and a manager that asks for redos.

Arguments: fp32 or bf16, criterion inside or outside of the module, redone steps.
"""

import hashlib
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import torch  # noqa: E402

from mnemosyne_plugin.adapters.deepspeed.hooks import (  # noqa: E402
    EngineHooks,
    check_targets,
)
from mnemosyne_plugin.adapters.deepspeed.state import (  # noqa: E402
    EngineState,
    check_supported,
)
from mnemosyne_plugin.recovery.commit import Outcome  # noqa: E402

precision, criterion, redone = sys.argv[1:4]
redone_steps = {int(step) for step in redone.split(",") if step}


class FakeMesh:
    def absorb(self, on: bool) -> None:
        pass


class FakeManager:
    """Says REDO once at each of the steps that the test names."""

    mesh = FakeMesh()
    version = 0

    def phase(self, name: str) -> None:
        pass

    def begin(self) -> None:
        pass

    def commit(self) -> Outcome:
        if self.version in redone_steps:
            redone_steps.remove(self.version)
            return Outcome.REDO
        return Outcome.COMMIT

    def end(self) -> None:
        self.version += 1


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            # Batch norm mutates buffers in forward; it has no mixed bf16 kernel.
            (torch.nn.BatchNorm1d if precision == "fp32" else torch.nn.LayerNorm)(16),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 4),
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = self.layers(x)
        return loss_of(out, y) if criterion == "inside" else out


def loss_of(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    noise = torch.rand(()) if criterion == "outside" else 1.0
    return torch.nn.functional.cross_entropy(out.float(), y) * noise


os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
os.environ.setdefault("MASTER_PORT", "0")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
torch.manual_seed(1)
model = Model()
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
manager = FakeManager()
check_targets(engine)
check_supported(engine)
EngineHooks(engine, manager).install()  # type: ignore[arg-type]
dtype = torch.bfloat16 if precision == "bf16" else torch.float32
for _ in range(5):
    for _ in range(2):
        x, y = torch.randn(6, 8).to(dtype), torch.randint(0, 4, (6,))
        loss = engine(x, y)
        if criterion == "outside":
            loss = loss_of(loss, y)
        engine.backward(loss)
        engine.step()
assert manager.version == engine.global_steps == 5
assert not redone_steps
digest = hashlib.sha256()
for key, tensor in EngineState(engine).tensors().items():
    digest.update(
        key.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )
digest.update(torch.rand(1).numpy().tobytes())
print("digest", digest.hexdigest())
