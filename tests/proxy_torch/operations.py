"""Each operation on the device and on the CPU; run under the device proxy.

    python tests/proxy_torch/operations.py

Prints a line for each operation, with the largest difference; ends with 1 if one is
beyond its tolerance. Twice on the device must give the same bits.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[..., Tensor | tuple[Tensor, ...]]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return numbers on the CPU that are the same each time."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def with_gradients(function: Operation) -> Operation:
    """Return a function that also gives the gradients of its arguments."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone() for x in arguments]
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
        result = function(*leaves)
        weights = random(*result.shape, dtype=torch.bfloat16, seed=9).to(result)
        (result * weights).sum().backward()
        return (result, *(x.grad for x in leaves if x.requires_grad))

    return run


def in_place(function: Callable[..., object]) -> Operation:
    """Return a function that gives what `function` makes of its first argument."""

    def run(first: Tensor, *others: Tensor) -> Tensor:
        copy = first.clone()
        function(copy, *others)
        return copy

    return run


def adamw(parameter: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Take two steps; on the device with the fused optimizer."""
    parameter = parameter.clone().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=parameter.is_cuda)
    for _ in range(2):
        parameter.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter, state["exp_avg"], state["exp_avg_sq"]


def adamw_over_lists(parameter: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Take two steps by operations over lists of tensors, which have no kernel each."""
    parameters = [parameter.clone().requires_grad_(), gradient.clone().requires_grad_()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=True)
    for _ in range(2):
        for each in parameters:
            each.grad = gradient.clone()
        optimizer.step()
    return (*parameters, *(optimizer.state[each]["exp_avg_sq"] for each in parameters))


def put_by_indices(to: Tensor, values: Tensor) -> None:
    """Put values at places that two tensors name."""
    places = torch.arange(3, device=to.device)
    to[places, places * 2] = values


def clip(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Clip gradients, by the kernels over lists of tensors."""
    parameters = [torch.zeros_like(g) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    return (norm, *(p.grad for p in parameters))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to what is before."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def elementwise(dtype: torch.dtype) -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield what is computed element by element."""
    a, b = random(37, 70, dtype=dtype), random(37, 70, dtype=dtype, seed=1)
    positive = a.abs() + 0.5
    layouts = [
        ("", a, b),
        (" strided", a.t()[::2], b.t()[::2]),
        (" broadcast", a, b[0]),
    ]
    for layout, x, y in layouts:
        yield f"add{layout}", lambda x, y: torch.add(x, y, alpha=0.5), [x, y]
        yield f"sub{layout}", torch.sub, [x, y]
        yield f"mul{layout}", torch.mul, [x, y]
        yield f"div{layout}", torch.div, [x, y.abs() + 0.5]
        yield f"maximum{layout}", torch.maximum, [x, y]
        yield f"copy{layout}", lambda x, y: x.contiguous(), [x, y]
        yield f"lt{layout}", torch.lt, [x, y]
        yield f"eq{layout}", torch.eq, [x, y]
        yield f"where{layout}", lambda x, y: torch.where(x > 0, x, y), [x, y]
    yield "add scalar", lambda x: x + 2, [a]
    yield "scalar sub", lambda x: 2 - x, [a]
    yield "mul scalar", lambda x: x * 1.5, [a]
    yield "div scalar", lambda x: x / 3, [a]
    yield "scalar div", lambda x: 3 / x, [positive]
    yield "le scalar", lambda x: x <= 0.25, [a]
    yield "clamp", lambda x: x.clamp(-0.5, 0.5), [a]
    yield "clamp max", lambda x: x.clamp(max=0.1), [a]
    yield "neg", torch.neg, [a]
    yield "abs", torch.abs, [a]
    yield "exp", torch.exp, [a]
    yield "log", torch.log, [positive]
    yield "sqrt", torch.sqrt, [positive]
    yield "rsqrt", torch.rsqrt, [positive]
    yield "reciprocal", torch.reciprocal, [positive]
    yield "ceil", torch.ceil, [a]
    yield "sin", torch.sin, [a]
    yield "cos", torch.cos, [a]
    yield "pow 2", lambda x: x**2, [a]
    yield "pow 3", lambda x: x**3, [a]
    yield "pow 1.7", lambda x: x**1.7, [positive]
    yield "tanh", with_gradients(torch.tanh), [a]
    yield "sigmoid", with_gradients(torch.sigmoid), [a]
    yield "silu", with_gradients(F.silu), [a]
    yield "gelu", with_gradients(F.gelu), [a]
    yield "gelu tanh", with_gradients(lambda x: F.gelu(x, approximate="tanh")), [a]
    yield "addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.3), [a, b]
    yield "addcdiv", lambda x, y: torch.addcdiv(x, x, y, value=0.3), [a, positive]
    yield "lerp", lambda x, y: torch.lerp(x, y, 0.3), [a, b]
    yield "masked_fill", lambda x: x.masked_fill(x > 0, -1), [a]
    yield "fill", in_place(lambda x: x.fill_(3.25)), [a]
    yield "to float", lambda x: x.float(), [a]
    yield "to bfloat16", lambda x: x.bfloat16(), [a]
    yield "to bfloat16 strided", lambda x: x.t()[::2].bfloat16(), [a]


def others(dtype: torch.dtype) -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield reductions, lookups, layers and optimizers."""
    a, b = random(40, 64, dtype=dtype), random(40, 64, dtype=dtype, seed=1)
    weight = random(64, dtype=dtype, seed=2)
    table = random(50, 64, dtype=dtype)
    tokens = torch.arange(160).mul(37).remainder(50)
    qkv = [random(2, 3, 40, 16, dtype=dtype, seed=s) for s in range(3)]
    yield "sum", torch.sum, [a]
    yield "sum rows", lambda x: x.sum(0), [a]
    yield "sum columns", lambda x: x.sum(1), [a]
    yield "sum strided", lambda x: x.t()[::3].sum(1), [a]
    yield "sum as float", lambda x: x.sum(0, dtype=torch.float32), [a]
    yield "mean", lambda x: x.mean(1), [a]
    yield "amax", lambda x: x.amax(1), [a]
    yield "amin", lambda x: x.amin(0), [a]
    yield "norm", torch.linalg.vector_norm, [a]
    yield "norm 1", lambda x: torch.linalg.vector_norm(x, 1), [a]
    yield "all", lambda x: (x < 9).all(), [a]
    yield "any", lambda x: (x > 9).any(), [a]
    yield "cat", lambda x, y: torch.cat([x, y]), [a, b]
    yield "cat columns", lambda x, y: torch.cat([x, y[:, :3]], 1), [a, b]
    yield "stack", lambda x, y: torch.stack([x[0, 0], y[0, 0], x[1, 1]]), [a, b]
    yield "tril", torch.tril, [a]
    yield "triu", lambda x: torch.triu(x, 1), [a]
    yield "softmax", with_gradients(lambda x: x.softmax(-1)), [a]
    yield "log_softmax", with_gradients(lambda x: x.log_softmax(-1)), [a]
    yield "matmul", with_gradients(lambda x, y: x @ y.t()), [a, b]
    yield "linear", with_gradients(F.linear), [a, table, random(50, dtype=dtype)]
    yield "bmm", with_gradients(torch.bmm), [qkv[0][0], qkv[1][0].mT.contiguous()]
    yield (
        "layer_norm",
        with_gradients(lambda x, w, v: F.layer_norm(x, (64,), w, v)),
        [a, weight, random(64, dtype=dtype, seed=3)],
    )
    yield "embedding", with_gradients(F.embedding), [tokens, table]
    yield "cross_entropy", with_gradients(F.cross_entropy), [a.float(), tokens[:40]]
    yield "attention", with_gradients(attention), qkv
    yield "adamw", adamw, [a, b]
    yield "adamw over lists", adamw_over_lists, [a, b]
    yield "by indices", lambda x, n: x[n[:40], n[40:80]], [a, tokens % 40]
    yield "to indices", in_place(put_by_indices), [a, b[0, :3]]
    yield "scatter", in_place(scatter), [tokens, tokens]
    if dtype is torch.float32:
        yield "index_select", with_gradients(select), [a, tokens % 40]
    yield "clip_grad_norm", clip, [a, b, weight]


def integers() -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield what indices and masks are made with."""
    a = torch.arange(70).reshape(7, 10)
    yield "arange", lambda x: torch.arange(3, 90, 2, device=x.device), [a]
    yield "clamp integers", lambda x: x.clamp(5, 60), [a]
    yield "clamp int", lambda x: x.int().clamp(min=5), [a]
    floats = torch.float32
    yield "arange floats", lambda x: torch.arange(9, device=x.device, dtype=floats), [a]
    yield "pow by tensor", lambda x: x.float() ** (x > 9).float(), [a]
    yield "max with places", lambda x: tuple((x * (x < 45)).float().max(1)), [a]
    yield "min with places", lambda x: tuple((x * (x < 45)).float().min(0)), [a]
    yield "place of max", lambda x: (x * (x < 45)).float().argmax(1), [a]
    yield "max integers", torch.max, [a]
    yield "sums so far", lambda x: x.cumsum(0), [a]
    yield "one hot", lambda x: F.one_hot(x[0], num_classes=10), [a]
    yield "top", lambda x: torch.topk(x.float(), 5, dim=0), [a * 37 % 71]
    yield "least", lambda x: torch.topk(x.float(), 3, largest=False), [a * 37 % 71]
    yield "add integers", lambda x: x + x.t().reshape(7, 10), [a]
    yield "mul integers", lambda x: x * 3, [a]
    yield "sum integers", torch.sum, [a]
    yield "eq integers", lambda x: x == 3, [a]
    yield "not", lambda x: torch.logical_not(x == 3), [a]
    yield "to float of integers", lambda x: x.float(), [a]
    yield "logical and", lambda x: torch.logical_and(x > 9, x < 40), [a]
    yield "logical or", lambda x: torch.logical_or(x > 40, x < 9), [a]
    yield "bitwise and", lambda x: (x > 9) & (x < 40), [a]
    yield "bitwise or", lambda x: (x > 40) | (x < 9), [a]
    yield "bitwise not", lambda x: ~(x > 9), [a]
    yield "mul booleans", lambda x: (x > 9) * (x < 40), [a]


def doubles() -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Yield what norms are made with that are summed up in doubles."""
    a = random(40, 64, dtype=torch.float64)
    yield "sum doubles", torch.sum, [a]
    yield "norm doubles", torch.linalg.vector_norm, [a]
    yield "pow 2 doubles", lambda x: x**2, [a]
    yield "pow 1.5 doubles", lambda x: (x**2) ** 1.5, [a]


def scatter(to: Tensor, places: Tensor) -> None:
    """Put numbers at places along a dimension."""
    to.scatter_(0, places[:50], torch.arange(50, device=to.device))


def select(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows, some of them more than once."""
    return rows.index_select(0, places)


def distance(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative where numbers are above one."""
    got, want = got.cpu().double(), want.double()
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    return float(((got - want).abs() / want.abs().clamp(min=1)).max())


def compare(function: Operation, arguments: list[Tensor]) -> float:
    """Run on both; infinity if the device gives other types, or other bits again.

    The CPU computes with doubles, from the same numbers.
    """

    def run(device: str, is_exact: bool = False) -> list[Tensor]:
        results = function(
            *(
                x.double() if is_exact and x.is_floating_point() else x.to(device)
                for x in arguments
            )
        )
        if isinstance(results, Tensor):
            results = (results,)
        return [x.detach().cpu() for x in results]

    want, exact = run("cpu"), run("cpu", is_exact=True)
    try:
        got, again = run("cuda"), run("cuda")
    except RuntimeError as error:
        print(error.args[0].splitlines()[0])
        if ctypes.CDLL(None).mnemosyne_proxy_recover(60_000) != 0:
            raise
        return float("inf")
    same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    if not same or [x.dtype for x in got] != [x.dtype for x in want]:
        return float("inf")
    return max(map(distance, got, exact))


def dropout() -> float:
    """Compare how much is kept with what should be, and the gradient's mask."""
    torch.cuda.manual_seed(1)
    x = torch.ones(10_000, device="cuda", requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    if not torch.equal(x.grad.cpu(), y.detach().cpu()):
        return float("inf")
    return abs(float((y.cpu() > 0).float().mean()) - 0.75)


def normal(dtype: torch.dtype) -> float:
    """Compare mean, deviation and the tails with what they should be."""
    torch.cuda.manual_seed(1)
    x = torch.empty(10_000, device="cuda", dtype=dtype).normal_(2, 0.5).cpu().float()
    torch.cuda.manual_seed(1)
    again = torch.empty(10_000, device="cuda", dtype=dtype).normal_(2, 0.5)
    if not torch.equal(again.cpu().float(), x):
        return float("inf")
    tails = float(((x - 2).abs() > 1).float().mean())
    return max(abs(float(x.mean()) - 2), abs(float(x.std()) - 0.5), abs(tails - 0.0455))


def uniform(dtype: torch.dtype) -> float:
    """Compare mean, spread and bounds with what they should be."""
    x = torch.empty(10_000, device="cuda", dtype=dtype).uniform_(1, 3).cpu().float()
    if float(x.min()) < 1 or float(x.max()) >= 3:
        return float("inf")
    return max(abs(float(x.mean()) - 2), abs(float(x.std()) - 1 / 3**0.5))


def main() -> int:
    """Run all of them."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    failed = 0

    def report(name: str, difference: float, tolerance: float) -> None:
        nonlocal failed
        is_good = difference <= tolerance
        failed += not is_good
        print(f"{'ok' if is_good else 'WRONG':5} {difference:.1e} {name}", flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        for cases in (elementwise, others):
            for name, function, arguments in cases(dtype):
                difference = compare(function, arguments)
                report(f"{name} {dtype}", difference, TOLERANCE[dtype])
    for name, function, arguments in integers():
        report(name, compare(function, arguments), 0)
    for name, function, arguments in doubles():
        report(name, compare(function, arguments), 1e-13)
    report("dropout", dropout(), 0.02)
    for dtype in (torch.float32, torch.bfloat16):
        report(f"normal {dtype}", normal(dtype), 0.02)
        report(f"uniform {dtype}", uniform(dtype), 0.02)
    print("failed", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
