"""A training loop of torch survives the ends of its device's server."""

import pytest
from under_proxy import needs_torch, run

pytestmark = [needs_torch, pytest.mark.timeout(900)]

# About 330 operations in a step, and 120 to bring the state back.
KILLS = ["--kill-within=700", "--kills=120"]


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
    undisturbed = run("gpt.py", "--steps=30", *options)
    # What is not brought back is NaN.
    disturbed = run("gpt.py", "--steps=30", *options, *KILLS)
    assert disturbed.stdout == undisturbed.stdout
    recoveries = int(disturbed.stderr.rsplit("recoveries ", 1)[1].split()[0])
    assert recoveries > 30
