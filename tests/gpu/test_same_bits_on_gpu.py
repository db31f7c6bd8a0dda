"""A program computes the same bits with the proxy and without, and behind a loss."""

import pytest
from figures import Figures
from on_gpu import PROXY_TORCH, Done, needs_gpu, needs_kernels, run

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

GPT = PROXY_TORCH / "gpt.py"


def hashes(done: Done) -> dict[str, str]:
    """Return what same_bits.py has printed, by the operations' names."""
    words = [line.split(" ", 2) for line in done.output.splitlines()]
    return {name: text for kind, text, name in words if kind == "hash"}


def losses(done: Done) -> list[list[str]]:
    """Return the lines of gpt.py without the traces of commands."""
    lines = (line.split() for line in done.output.splitlines())
    return [words[:3] for words in lines if words[0].isdigit() or words[0] == "digest"]


def test_operations_give_the_same_bits_with_and_without_the_proxy(
    figures: Figures,
) -> None:
    once, twice = (hashes(run("same_bits.py", on_proxy=False)) for _ in range(2))
    by_proxy = hashes(run("same_bits.py"))
    # What is not the same twice without the proxy tells nothing.
    steady = [name for name in once if once[name] == twice[name]]
    different = [name for name in steady if once[name] != by_proxy.get(name)]
    figures.add("operations, same bits twice without the proxy", len(steady))
    figures.add("operations, other bits with the proxy", different or "none")
    failed = [name for name, text in by_proxy.items() if text == "error"]
    figures.add("operations that the proxy refuses or fails", failed or "none")
    assert len(steady) > 0.9 * len(once)
    assert not different


def test_operations_give_the_same_bits_in_the_next_server(figures: Figures) -> None:
    done = run("same_bits.py", "--restart")
    figures.add(
        "operations, other bits in the next server", " ".join(done.values("different"))
    )


@pytest.mark.parametrize("options", ["bf16 flash", "fp32 math"])
def test_a_gpt_gives_the_same_losses_with_and_without_the_proxy(
    figures: Figures, options: str
) -> None:
    dtype, attention = options.split()
    arguments = ["--steps=8", f"--dtype={dtype}", f"--attention={attention}", "--pin"]
    arguments += ["--dropout=0.1", "--deterministic"]
    native = losses(run(GPT, *arguments, on_proxy=False))
    by_proxy = losses(run(GPT, *arguments))
    assert len(native) == 9
    figures.add(f"GPT, {options}, last loss", f"{native[-2][2]}, {by_proxy[-2][2]}")
    assert by_proxy == native


@needs_kernels
def test_launches_with_attributes_work_in_both_servers(figures: Figures) -> None:
    done = run("launches.py")
    assert done.output.count("right") == 8
