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


def hashes() -> dict[str, str]:
    """Return those of all operations' results."""
    found = {}
    for name, function, arguments in cases():
        results = function(*(x.cuda() for x in arguments))
        hashed = hashlib.sha256()
        for tensor in (results,) if isinstance(results, Tensor) else results:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().tobytes())
        found[name] = hashed.hexdigest()[:12]
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
