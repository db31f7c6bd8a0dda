"""The faults that are found in the middle of the runtime's own phases."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnemosyne_plugin.chaos import Fault, Injector

Step = Callable[[list[torch.nn.Parameter]], None]


def parameters() -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(3).share_memory_()) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    return parameters


def step_at_once(parameters: list[torch.nn.Parameter]) -> None:
    torch.optim.AdamW(parameters).step()


def step_in_groups(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        torch.optim.AdamW([parameter]).step()


def die(
    folder: Path,
    step: Step,
    written: list[torch.nn.Parameter],
    steps: tuple[int, ...] = (4,),
) -> int:
    """Let a child commit steps and make the last; return how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            injector = Injector([Fault((1,), 4, "mid-optimizer")], str(folder))
            for number in steps:
                injector(1, "optimizer", number)
            step(written)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("step", [step_at_once, step_in_groups])
def test_mid_optimizer_is_when_one_parameter_is_written_and_the_others_are_not(
    step: Step, tmp_path: Path
) -> None:
    written = parameters()
    assert die(tmp_path, step, written) == -signal.SIGKILL
    assert [bool(parameter.any()) for parameter in written] == [True, False, False]


def test_a_fault_fires_once_in_a_job(tmp_path: Path) -> None:
    assert die(tmp_path, step_at_once, parameters()) == -signal.SIGKILL
    written = parameters()
    assert die(tmp_path, step_at_once, written) == 0
    assert all(parameter.any() for parameter in written)


def test_no_step_later_than_the_one_asked_for_is_hit(tmp_path: Path) -> None:
    written = parameters()
    skipped_then_made = (4, 5)  # a gradient overflowed in the first
    assert die(tmp_path, step_at_once, written, skipped_then_made) == 0
    assert all(parameter.any() for parameter in written)
