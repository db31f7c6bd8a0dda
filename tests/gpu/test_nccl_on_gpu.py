"""NCCL's communicators are aborted and made anew."""

import pytest
from figures import Figures
from on_gpu import IS_EMULATED, Done, needs_gpu, run_ranks

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(200)]

TIMES = (
    *("first_all_reduce_ms", "all_reduce_ms", "abort_ms", "renew_ms"),
    *("all_reduce_behind_abort_ms", "recover_ms", "renew_in_next_server_ms"),
    "all_reduce_in_next_server_ms",
)


@pytest.fixture(scope="module")
def alone() -> Done:
    (done,) = run_ranks(1, "collectives.py")
    return done


def test_a_communicator_is_made_anew_behind_its_handle(
    figures: Figures, alone: Done
) -> None:
    figures.add("NCCL", ".".join(alone.values("nccl")))
    for name in TIMES:
        figures.add(f"NCCL, one rank, {name}", alone.number(name))
    figures.add("between events, and by the clock, ms", alone.values("event_ms")[1:])
    figures.add("attention, by default", " ".join(alone.values("attention_by_default")))


def test_two_ranks_share_a_gpu(figures: Figures, alone: Done) -> None:
    version = tuple(map(int, alone.values("nccl")))
    if version < (2, 30) and not IS_EMULATED:
        pytest.skip(f"NCCL {version} takes one rank per GPU; 2.30 takes more")
    both = run_ranks(2, "collectives.py", NCCL_MULTI_RANK_GPU_ENABLE="1")
    for name in TIMES:
        figures.add(f"NCCL, two ranks, {name}", [each.number(name) for each in both])
