"""Chaos, for demos and tests: kills workers of `mnemosyne run --chaos SPEC`.

A spec is ``kill rank=2 step=12 phase=backward [nth=2] [delay_ms=5]``, or has several
ranks (``rank=1,2``): who comes first waits for the others, and all die at once. Each
fault fires once in a job: its marks are files in the run directory, so a newcomer that
redoes the step does not die of it again. Production code never imports this module.

Most phases are entered where the runtime says so. ``mid-optimizer`` is found here: the
worker dies when part of what the step mutates is written, and part of it is not.
"""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.events import EventLog

PHASES = (
    *("data", "forward", "p2p", "backward", "reduce", "norm", "vote"),
    *("optimizer", "mid-optimizer", "gather", "between", "recovery"),
    *("save", "save-ask", "save-end", "save-vote", "load", "loaded"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Kill the workers of ``ranks`` when all have entered ``phase`` of ``step``."""

    ranks: tuple[int, ...]
    step: int
    phase: str
    nth: int = 1
    """Of the times that it enters the phase in the step."""
    delay_ms: float = 0.0
    """Kill that much later, in the middle of whatever is running then."""


def parse(spec: str) -> Fault:
    """Return the fault that ``spec`` describes; ConfigError names what is wrong."""
    verb, *pairs = spec.split() or [""]
    if verb != "kill":
        raise ConfigError(f"--chaos: unknown fault {verb!r}; known: kill")
    values: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or key not in ("rank", "step", "phase", "nth", "delay_ms"):
            raise ConfigError(
                f"--chaos: {pair!r} is not rank=, step=, phase=, nth= or delay_ms="
            )
        values[key] = value
    try:
        fault = Fault(
            ranks=tuple(int(rank) for rank in values["rank"].split(",")),
            step=int(values["step"]),
            phase=values["phase"],
            nth=int(values.get("nth", "1")),
            delay_ms=float(values.get("delay_ms", "0")),
        )
    except KeyError as error:
        raise ConfigError(f"--chaos: {spec!r} lacks {error.args[0]}=") from None
    except ValueError as error:
        raise ConfigError(f"--chaos: {spec!r}: {error}") from None
    is_in_range = min(fault.ranks) >= 0 and fault.step >= 0 and fault.nth >= 1
    if not is_in_range or not 0 <= fault.delay_ms < 1e6:
        raise ConfigError(f"--chaos: {spec!r} has a number out of range")
    if fault.phase not in PHASES:
        raise ConfigError(f"--chaos: phase {fault.phase!r} is not one of {PHASES}")
    return fault


class Injector:
    """Called at the begin of each phase of this worker's steps; may not return."""

    def __init__(self, faults: list[Fault], run_dir: str) -> None:
        self._faults = faults
        self._run_dir = Path(run_dir)
        self._place = (-1, "", -1)
        self._step = -1
        self._num_entered: Counter[str] = Counter()

    def __call__(self, rank: int, phase: str, step: int) -> None:
        self._place = (rank, phase, step)
        if step != self._step:
            self._step = step
            self._num_entered.clear()
        self._num_entered[phase] += 1
        for number, fault in enumerate(self._faults):
            if rank not in fault.ranks or fault.step != step:
                continue
            is_midway = (fault.phase, phase) == ("mid-optimizer", "optimizer")
            if fault.phase == phase and self._num_entered[phase] >= fault.nth:
                self._fire(number, fault)
            elif is_midway and not self._marks(number, rank):
                _on_half_a_mutation(partial(self._fire_midway, number, fault))

    def _fire_midway(self, number: int, fault: Fault) -> None:
        # The step may have been skipped; a later one is not what was asked for.
        rank, *place = self._place
        if rank in fault.ranks and place == ["optimizer", fault.step]:
            self._fire(number, fault)

    def _fire(self, number: int, fault: Fault) -> None:
        rank = self._place[0]
        if self._marks(number, rank):
            return
        (self._run_dir / f"fault-{number}-{rank}.{os.getpid()}").touch()
        args = (number, fault, rank)
        if fault.delay_ms:
            threading.Thread(target=self._kill, args=args, daemon=True).start()
        else:
            self._kill(*args)

    def _marks(self, number: int, rank: int | str) -> list[Path]:
        """Those whom the fault has found, each with its pid as the suffix."""
        return list(self._run_dir.glob(f"fault-{number}-{rank}.*"))

    def _kill(self, number: int, fault: Fault, rank: int) -> None:
        # The delay is the fault that was asked for, not a wait for something.
        time.sleep(fault.delay_ms / 1000)
        events = EventLog(str(self._run_dir), f"chaos-{os.getpid()}")
        events.emit("fault", rank=rank, step=fault.step, phase=fault.phase)
        while len(marks := self._marks(number, "*")) < len(fault.ranks):
            signal.pause()  # the last one kills all
        pids = [int(mark.suffix[1:]) for mark in marks]
        for pid in sorted(pids, key=os.getpid().__eq__):  # itself last
            os.kill(pid, signal.SIGKILL)


def _on_half_a_mutation(call: Callable[[], None]) -> None:
    """Call when an optimizer has written some of what this step mutates.

    Sharded optimizers make one ``step`` per parameter group: behind the first of them.
    Others write one parameter after the other: in front of the second. torch's Adam
    family ends the work on each parameter with an addcdiv.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils._python_dispatch import TorchDispatchMode

    num_written = 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal num_written
            if func is torch.ops.aten.addcdiv_.default:
                if num_written == 1:
                    call()
                num_written += 1
            return func(*args, **(kwargs or {}))

    register_optimizer_step_post_hook(lambda *_: call())
    watch: Any = Watch
    watch().__enter__()  # for good: this process is about to die


def from_environment() -> Injector:
    """Return the injector for MNEMOSYNE_CHAOS (a JSON list of specs)."""
    specs = json.loads(os.environ["MNEMOSYNE_CHAOS"])
    return Injector([parse(s) for s in specs], os.environ["MNEMOSYNE_RUN_DIR"])


def main() -> None:
    """Be the nursery of workers that have an injector."""
    from mnemosyne_plugin.launch import nursery

    nursery.main(on_phase=from_environment())


if __name__ == "__main__":
    main()
