"""What the proxy adds to a step. Figures, and no bounds but one against nonsense."""

import statistics

import pytest
from figures import Figures
from on_gpu import IS_EMULATED, needs_gpu, run

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

NUM_PAIRS = 1 if IS_EMULATED else 2
NUM_STEPS = 6 if IS_EMULATED else 50
TIMES = ("median_ms", "wall_ms", "cpu_ms", "server_cpu_ms")
RATES = (
    *("pinned_to_device", "device_to_pinned"),
    *("pageable_to_device", "device_to_pageable"),
)


def test_a_step_takes_about_as_long_with_the_proxy(figures: Figures) -> None:
    native, by_proxy = [], []
    for _ in range(NUM_PAIRS):
        native.append(run("step.py", f"--steps={NUM_STEPS}", on_proxy=False))
        by_proxy.append(run("step.py", f"--steps={NUM_STEPS}"))

    def compare(name: str) -> tuple[float, float]:
        values = [
            statistics.median(each.number(name) for each in side)
            for side in (native, by_proxy)
        ]
        ratio = f", ratio {values[1] / values[0]:.3f}" if values[0] else ""
        figures.add(
            f"{name}, without and with the proxy",
            f"{values[0]:.2f}, {values[1]:.2f}{ratio}",
        )
        return values[0], values[1]

    figures.add("step: parameters of the GPT", int(native[0].number("parameters")))
    alone, proxied = compare("median_ms")
    for name in (*TIMES[1:], "pin_ms", *RATES):
        compare(name)
    for name in ("commands", "round_trips"):
        figures.add(f"{name} per step", by_proxy[0].number(name))
    losses = {tuple(each.values("loss")) for each in native + by_proxy}
    figures.add("losses behind the last step", sorted(losses))
    assert IS_EMULATED or proxied < 2 * alone  # there it competes for the same cores
