"""A training loop of torch survives the ends of its device's server."""

from subprocess import CompletedProcess

import pytest
from under_proxy import needs_torch, run, run_ranks

pytestmark = [needs_torch, pytest.mark.timeout(900)]

# Fewer operations than a step has: no server but the last sees a whole one.
KILLS = ["--kill-within=200", "--kills=300"]


def num_recoveries(done: CompletedProcess[str]) -> int:
    """Return how many servers a program started after its first."""
    return int(done.stderr.rsplit("recoveries ", 1)[1].split()[0])


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype=bf16", "--dropout=0.1", "--pin", "--workers=2"],
        ["--dtype=fp32", "--attention=math"],
    ],
    ids=["bf16", "fp32"],
)
def test_a_server_that_ends_anywhere_changes_no_bit_of_the_training(
    options: list[str],
) -> None:
    undisturbed = run("gpt.py", "--steps=16", *options)
    # What is not brought back is NaN.
    disturbed = run("gpt.py", "--steps=16", *options, *KILLS)
    assert disturbed.stdout == undisturbed.stdout
    assert num_recoveries(disturbed) > 10


@pytest.mark.parametrize("world_size", [1, 2])
def test_servers_of_any_rank_that_end_change_no_bit_of_ddp(world_size: int) -> None:
    options = ["--ddp", "--steps=12", "--dropout=0.1"]
    undisturbed = run_ranks(world_size, "gpt.py", *options)
    kills = ["--kill-within=1200", "--kills=12"]  # of both, also while they go back
    disturbed = run_ranks(world_size, "gpt.py", *options, *kills)
    assert [x.stdout for x in disturbed] == [x.stdout for x in undisturbed]
    assert all(num_recoveries(x) > 6 for x in disturbed)
