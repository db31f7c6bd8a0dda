"""Operations of many kinds on the device, and a hash of what each gives.

    python tests/gpu/same_bits.py [--restart]

With `--restart` the server of the device proxy is ended in between, and all of them are
done once more: the second time must give the same.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator

import operations
import torch
import torch.nn.functional as F
from operations import Operation, random, with_gradients
from servers import end_server
from torch import Tensor

from mnemosyne_plugin import proxy

IS_EMULATED = os.environ.get("MNEMOSYNE_PROXY_DEVICE") == "emulated"
SIZE = 96 if IS_EMULATED else 2048
NUM_COPIES = 2_000 if IS_EMULATED else 20_000


def small_copies(first: Tensor) -> Tensor:
    """Copy many times out of one buffer that changes right behind each copy."""
    to = torch.empty(NUM_COPIES, 4, dtype=torch.int64, device=first.device)
    buffer = torch.empty(4, dtype=torch.int64)
    for i in range(NUM_COPIES):
        to[i].copy_(buffer.fill_(i), non_blocking=True)
        buffer.fill_(-1)
    assert torch.equal(to.cpu(), torch.arange(NUM_COPIES)[:, None].expand(-1, 4))
    return to


def copies_of_all_sizes(first: Tensor) -> list[Tensor]:
    """Copy from memory that is not pinned, which changes right behind each copy."""
    all_of_them = []
    for size in (1, 1_000, 2_047, 2_049, 40_000, 1_200_001, 3_000_000):
        source = torch.arange(size)
        want = source.clone()
        there = torch.empty(size, dtype=torch.int64, device=first.device)
        there.copy_(source, non_blocking=True)
        source.zero_()
        assert torch.equal(there.cpu(), want), size
        all_of_them.append(there)
    return all_of_them


def pinned_copies(first: Tensor) -> Tensor:
    """Copy there and back between pinned memory and the device."""
    source = torch.arange(1_200_001).pin_memory()
    there = source.to(first.device, non_blocking=True)
    back = torch.empty_like(source, pin_memory=True)
    back.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(source, back)
    return there


def drawn(first: Tensor) -> list[Tensor]:
    """Draw random numbers, which come from a state in host memory."""
    torch.cuda.manual_seed(3)
    x = torch.empty(1000, device=first.device)
    masked = F.dropout(torch.ones_like(x, requires_grad=True), 0.5)
    return [x.normal_().clone(), x.uniform_(), masked]


def large(dtype: torch.dtype) -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield what a GPT spends its time with."""
    a, b = random(SIZE, SIZE, dtype=dtype), random(SIZE, SIZE, dtype=dtype, seed=1)
    bias = random(SIZE, dtype=dtype, seed=2)
    yield "add large", torch.add, [a, b]
    yield "matmul large", torch.matmul, [a, b]
    yield "matmul odd", lambda x, y: x[:-3, :-1] @ y[:-1, :-5], [a, b]
    yield "linear large", with_gradients(F.linear), [a, b, bias]
    yield "bmm large", torch.bmm, [a.view(4, -1, SIZE), b.view(4, SIZE, -1)]


def without_host_functions() -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield what the emulated device has no kernels for: sorts, scans, other types."""
    a, b = random(300, 700), random(300, 700, seed=1)
    tokens = torch.arange(9000).mul(37).remainder(500)
    table = random(500, 64)
    half = [x.half() for x in (a, b.mT.contiguous())]
    qkv = [random(2, 3, 256, 64, dtype=torch.bfloat16, seed=s) for s in range(3)]
    yield "sort", lambda x: tuple(x.sort(-1)), [a]
    yield "topk", lambda x: tuple(x.topk(9)), [a]
    yield "cumsum", lambda x: x.cumsum(-1), [a]
    yield "nonzero", lambda x: (x > 1).nonzero(), [a]
    yield "masked_select", lambda x: x[x > 1], [a]
    yield "unique", torch.unique, [tokens]
    yield "bincount", lambda x: torch.bincount(x, minlength=500), [tokens]
    yield "argmax", lambda x: x.argmax(-1), [a]
    yield "var", lambda x: x.var(-1), [a]
    yield "logsumexp", lambda x: x.logsumexp(-1), [a]
    yield "embedding many", with_gradients(F.embedding), [tokens, table]
    yield (
        "cross_entropy many",
        with_gradients(F.cross_entropy),
        [table, tokens[:500] % 64],
    )
    yield "matmul half", torch.matmul, half
    yield "matmul doubles", torch.matmul, [a.double(), b.mT.double()]
    yield "matmul complex", torch.matmul, [a.cfloat(), b.mT.cfloat()]
    yield "matrix vector", torch.mv, [a, b[0]]
    yield "outer", torch.outer, [a[0], b[0]]
    yield "rms_norm", lambda x: F.rms_norm(x, (700,)), [a]
    yield "group_norm", lambda x: F.group_norm(x[None], 10), [a]
    yield "interpolate", lambda x: F.interpolate(x[None, None], scale_factor=2), [a]
    yield "attention of 256", operations.attention, qkv


def cases() -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield a name, a function and its arguments for each operation."""
    nothing = torch.zeros(1)
    for function in (small_copies, copies_of_all_sizes, pinned_copies, drawn):
        yield function.__name__, function, [nothing]
    for dtype in (torch.float32, torch.bfloat16):
        for some in (operations.elementwise, operations.others, large):
            for name, function, arguments in some(dtype):
                yield f"{name} {str(dtype)[6:]}", function, arguments
    yield from operations.integers()
    yield from operations.doubles()
    if not IS_EMULATED:
        yield from without_host_functions()


def hashes() -> dict[str, str]:
    """Return those of all operations' results; what failed has "error" for one."""
    found, device = {}, proxy.loaded()
    for name, function, arguments in cases():
        hashed = hashlib.sha256()
        try:
            results = function(*(x.cuda() for x in arguments))
            for tensor in (results,) if isinstance(results, Tensor) else results:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                hashed.update(flat.view(torch.uint8).numpy().tobytes())
            found[name] = hashed.hexdigest()[:12]
        except (AssertionError, RuntimeError) as error:
            print(f"{name}: {str(error).splitlines()[:1]}", file=sys.stderr)
            found[name] = "error"
            if device is not None and device.is_lost:
                device.recover(60)
    return found


def main() -> int:
    """Print a line for each operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restart", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    found = hashes()
    for name, text in found.items():
        print("hash", text, name)
    if not options.restart:
        return 0
    device = proxy.loaded()
    assert device is not None
    end_server(device)
    device.recover(60)
    again = hashes()
    different = [name for name in found if found[name] != again[name]]
    print("different", len(different), *different)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
