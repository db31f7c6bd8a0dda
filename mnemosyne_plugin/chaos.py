"""Chaos, for demos and tests: kills workers of `mnemosyne run --chaos SPEC`.

A spec is ``kill rank=2 step=12 phase=backward [delay_ms=5]``. Each fault fires once in
a job: its mark is a file in the run directory, so a newcomer that redoes the step does
not die of it again. Production code never imports this module.
"""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.events import EventLog

PHASES = ("data", "forward", "backward", "reduce", "vote", "optimizer", "between")


@dataclass(frozen=True, slots=True)
class Fault:
    """Kill the worker of ``rank`` when it enters ``phase`` of ``step``."""

    rank: int
    step: int
    phase: str
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
        if not separator or key not in ("rank", "step", "phase", "delay_ms"):
            raise ConfigError(
                f"--chaos: {pair!r} is not rank=, step=, phase= or delay_ms="
            )
        values[key] = value
    try:
        fault = Fault(
            rank=int(values["rank"]),
            step=int(values["step"]),
            phase=values["phase"],
            delay_ms=float(values.get("delay_ms", "0")),
        )
    except KeyError as error:
        raise ConfigError(f"--chaos: {spec!r} lacks {error.args[0]}=") from None
    except ValueError as error:
        raise ConfigError(f"--chaos: {spec!r}: {error}") from None
    if fault.rank < 0 or fault.step < 0 or not 0 <= fault.delay_ms < 1e6:
        raise ConfigError(f"--chaos: {spec!r} has a number out of range")
    if fault.phase not in PHASES:
        raise ConfigError(f"--chaos: phase {fault.phase!r} is not one of {PHASES}")
    return fault


class Injector:
    """Called at the begin of each phase of this worker's steps; may not return."""

    def __init__(self, faults: list[Fault], run_dir: str) -> None:
        self._faults = faults
        self._run_dir = Path(run_dir)

    def __call__(self, rank: int, phase: str, step: int) -> None:
        for number, fault in enumerate(self._faults):
            if (fault.rank, fault.step, fault.phase) != (rank, step, phase):
                continue
            try:
                (self._run_dir / f"fault-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            if fault.delay_ms:
                threading.Thread(target=self._kill, args=(fault,), daemon=True).start()
            else:
                self._kill(fault)

    def _kill(self, fault: Fault) -> None:
        # The delay is the fault that was asked for, not a wait for something.
        time.sleep(fault.delay_ms / 1000)
        events = EventLog(str(self._run_dir), f"chaos-{os.getpid()}")
        events.emit("fault", rank=fault.rank, step=fault.step, phase=fault.phase)
        os.kill(os.getpid(), signal.SIGKILL)


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
