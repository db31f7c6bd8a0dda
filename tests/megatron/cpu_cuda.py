"""What Megatron needs of torch.cuda, on a machine without a GPU. For tests only.

Import it before Megatron. It changes torch in this process, for good:

- devices: ``torch.cuda.current_device()`` is the CPU; factories, ``Tensor.cuda``,
  ``Tensor.to`` and ``Module.to`` take "cuda" for "cpu" and do not pin memory.
  ``Tensor.to("cpu")`` copies, as it would from a GPU.
- generators: the "CUDA" generator is the CPU's default one. A DataLoader's iterator
  draws a seed from that, which would move what on a GPU is another stream: fenced.
- names: ``Tensor.type()`` says ``torch.cuda.FloatTensor``, which Megatron asks for.
- streams, events, synchronize, nvtx and memory figures do nothing.
- ``torch.compile`` returns what it is given: it would compile for a GPU.
- ``have_experts``: for mixtures of experts.
- ``claim_gpus``: ``torch.cuda.is_available()`` says yes, which ``pretrain`` insists on.
"""

import contextlib
import functools
import importlib
import logging
import os
import sys
import typing
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.data.dataloader as torch_dataloader
import typing_extensions

CPU = torch.device("cpu")
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "eye", "arange"),
    *("linspace", "rand", "randn", "randint", "randperm", "empty_strided"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
)


class _Stream:
    """Everything is done at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def wait_stream(self, *args: Any) -> None:
        pass

    wait_event = synchronize = wait_stream


class _Event(_Stream):
    def record(self, *args: Any) -> None:
        pass

    wait = record

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or str(device).startswith("cuda")


def _on_cpu(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _to_cpu(function: Any) -> Any:
    inner = _on_cpu(function)

    @functools.wraps(function)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved = [
            CPU if isinstance(a, str | int | torch.device) and _is_cuda(a) else a
            for a in args
        ]
        return inner(self, *moved, **kwargs)

    return to


def _giving(value: Any) -> Any:
    """Return a function; a new one each time, for torch keeps a table of its own."""
    return lambda *args, **kwargs: value


def _itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = _giving(None)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for cls in (torch.Tensor, torch.nn.Module):
        cls.cuda = _itself  # type: ignore[method-assign, assignment]
        cls.to = _to_cpu(cls.to)  # type: ignore[method-assign]
    to = torch.Tensor.to

    def copied(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = to(self, *args, **kwargs)
        return result.clone() if result is self and args[:1] == ("cpu",) else result

    torch.Tensor.to = copied  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = _itself  # type: ignore[method-assign, assignment]
    type_name = torch.Tensor.type

    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return type_name(self).replace("torch.", "torch.cuda.", 1)
        return type_name(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _generators() -> None:
    cuda: Any = torch.cuda

    def get(device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def put(state: torch.Tensor, device: Any = None, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(int(number))

    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = get, put
        module.manual_seed = module.manual_seed_all = seed
    begin = torch_dataloader._BaseDataLoaderIter.__init__

    def fenced(self: Any, *args: Any, **kwargs: Any) -> None:
        state = torch.get_rng_state()
        try:
            begin(self, *args, **kwargs)
        finally:
            torch.set_rng_state(state)

    torch_dataloader._BaseDataLoaderIter.__init__ = fenced  # type: ignore[method-assign]
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = get
    random._set_cuda_rng_state = put
    # It warns that the CPU's generator moves with the GPU's.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()
    for name in ("synchronize", "set_stream", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _giving(None))
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _giving(None))
    for name in ("allocated", "reserved"):
        setattr(cuda, f"memory_{name}", _giving(0))
        setattr(cuda, f"max_memory_{name}", _giving(0))
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.mem_get_info = _giving((1 << 34, 1 << 34))
    cuda.get_device_capability = _giving((8, 0))
    cuda.get_device_name = _giving("none")
    cuda.get_device_properties = _giving(
        SimpleNamespace(
            name="none",
            major=8,
            minor=0,
            multi_processor_count=1,
            total_memory=1 << 34,
            gcnArchName="none",
        )
    )


def _compile(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    return function if function is not None else lambda given: given


def have_experts() -> None:
    """Have Megatron's mixtures of experts do without a GPU."""
    moe = "megatron.core.transformer.moe."
    utils: Any = importlib.import_module(moe + "moe_utils")
    # It asks whether this is None; 0.16.1 has the name with Transformer Engine only.
    utils.te_general_gemm = getattr(utils, "te_general_gemm", None)

    def to_cpu(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher: Any = importlib.import_module(moe + "token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = to_cpu


def claim_gpus() -> None:
    """Say that there is a GPU for each local rank, as ``pretrain`` insists."""
    import megatron.core.datasets.utils as utils

    # Wheels do not have the Makefile with which it would compile a dataset's index.
    if not Path(utils.__file__).with_name("Makefile").exists():
        utils.compile_helpers = lambda: None
    with contextlib.suppress(ImportError):  # source trees of 0.16 ask nvcc
        kernels = importlib.import_module("megatron.legacy.fused_kernels")
        kernels.load = lambda args: None  # type: ignore[attr-defined]
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


if not hasattr(typing, "override"):  # Megatron from 0.17 on is for Python 3.12
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
os.environ["TORCHDYNAMO_DISABLE"] = "1"
if "torch._dynamo" in sys.modules:  # which has read that by now
    torch._dynamo.config.disable = True
torch.compile = _compile  # type: ignore[assignment]
_devices()
_streams()
_generators()
