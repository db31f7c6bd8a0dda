"""A training loop whose servers are killed at random times computes the same bits."""

import pytest
from figures import Figures
from on_gpu import IS_EMULATED, PROXY_TORCH, Done, needs_gpu, run, run_ranks
from test_same_bits_on_gpu import losses

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

GPT = PROXY_TORCH / "gpt.py"
STEPS = ["--steps=24"] if IS_EMULATED else ["--steps=600"]
OPTIONS = [*STEPS, "--dropout=0.1", "--deterministic"]
# Seconds, so that they hit a server's first commands as well as its steps.
KILLS = [f"--kill-after={0.4 if IS_EMULATED else 1.5}", "--kills=8"]


def num_recoveries(done: Done) -> int:
    """Return how many servers a program started after its first."""
    return int(done.errors.rsplit("recoveries ", 1)[1].split()[0])


def test_a_server_killed_at_any_time_changes_no_bit_of_the_training(
    figures: Figures,
) -> None:
    options = [*OPTIONS, "--pin", "--workers=2"]
    undisturbed = run(GPT, *options)
    disturbed = run(GPT, *options, *KILLS, timeout_s=180)
    figures.add("training: servers killed", num_recoveries(disturbed))
    figures.add("training: s without kills", undisturbed.seconds)
    figures.add("training: s with them", disturbed.seconds)
    assert losses(disturbed) == losses(undisturbed)
    assert num_recoveries(disturbed) >= 3


def test_the_same_with_ddp_over_nccl(figures: Figures) -> None:
    options = [*OPTIONS, "--ddp"]
    (undisturbed,) = run_ranks(1, GPT, *options)
    (disturbed,) = run_ranks(1, GPT, *options, *KILLS)
    figures.add("DDP: servers killed", num_recoveries(disturbed))
    assert losses(disturbed) == losses(undisturbed)
    assert num_recoveries(disturbed) >= 3
