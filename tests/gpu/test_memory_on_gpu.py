"""Device memory lies where it lay, in every server of every process."""

import statistics

import pytest
from figures import Figures
from on_gpu import DRIVER, IS_EMULATED, needs_gpu, run

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

NUM_PROCESSES = 4 if IS_EMULATED else 12


def test_the_driver_gives_the_addresses_that_are_asked_for(figures: Figures) -> None:
    done = run("first_calls.py", DRIVER, on_proxy=False)
    for name in ("cuInit", "cuDevicePrimaryCtxRetain", "cuMemAddressReserve"):
        figures.add(f"{name} in a fresh process, ms", done.values(name)[0])
        assert done.values(name)[1] == "0"
    assert done.values("reserved") == ["0x600000000000"]


def test_each_process_has_its_memory_at_the_same_addresses(figures: Figures) -> None:
    done = [run("memory.py", "addresses") for _ in range(NUM_PROCESSES)]
    found = {tuple(each.values("addresses")) for each in done}
    recoveries = [each.number("recover_ms") for each in done]
    ends = [each.number("end_ms") for each in done]
    figures.add(
        "processes, and lists of addresses in them", f"{len(done)}, {len(found)}"
    )
    figures.add("end of a server, ms, median", statistics.median(ends))
    figures.add("recovery of 560 MiB, ms, median", statistics.median(recoveries))
    figures.add("recovery of 560 MiB, ms, longest", max(recoveries))
    assert len(found) == 1


def test_nearly_all_memory_comes_back(figures: Figures) -> None:
    done = run("memory.py", "most", MNEMOSYNE_EMULATED="memory=1g")
    gib = done.number("gib")
    for name in (
        *("map_ms", "fill_ms", "unmap_ms", "end_ms", "free_behind_end_ms"),
        *("recover_ms", "end_and_recover_ms"),
    ):
        figures.add(f"{gib:.1f} GiB, {name}", done.number(name))
