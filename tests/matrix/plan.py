"""What the matrix is made of. Pure: no job runs here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FIRST_KILL, KILL_EVERY = 3, 3  # steps


class Configuration(Protocol):
    """One way of training."""

    @property
    def name(self) -> str: ...

    @property
    def world_size(self) -> int: ...

    @property
    def all_phases(self) -> tuple[str, ...]:
        """The phases of its trainer, in their order."""

    @property
    def script(self) -> Path: ...

    @property
    def preload(self) -> tuple[str, ...]: ...

    @property
    def script_args(self) -> list[str]: ...

    def files(self, folder: Path) -> list[str]:
        """Write what the script reads; return the arguments that say where."""

    def has_phase(self, phase: str) -> bool:
        """Whether its steps come to this phase."""

    def nth(self, phase: str) -> int:
        """Which of the times that a step enters the phase the kill is at."""


def victims(name: str, world_size: int) -> tuple[int, ...]:
    """Return the ranks that a victim's name stands for."""
    return {
        "first": (0,),
        "middle": ((world_size - 1) // 2,),
        "last": (world_size - 1,),
        # At once; neither is the next rank, the first buddy, of the other.
        "two": (0, 2),
    }[name]


VICTIMS = ("first", "middle", "last", "two")


def num_steps(phases: Sequence[str]) -> int:
    """Return how many steps a run has, with a kill in each phase."""
    return FIRST_KILL + KILL_EVERY * (len(phases) + 1)


@dataclass(frozen=True, slots=True)
class Kill:
    """The deaths of one cell."""

    phase: str
    step: int
    deaths: tuple[tuple[int, str], ...]
    """(rank, phase in which it dies)."""
    specs: tuple[str, ...]
    """For --chaos."""


def kills(
    configuration: Configuration, ranks: Sequence[int], phases: Sequence[str]
) -> Iterator[Kill]:
    """Yield the kills of one run: one phase after the other, steps apart.

    A phase dies in the same step in every run, whichever phases are with it.
    """
    for phase in phases:
        step = FIRST_KILL + KILL_EVERY * configuration.all_phases.index(phase)
        deaths = tuple(_deaths(ranks, phase, configuration.world_size))
        specs = (
            f"kill rank={rank} step={step} phase={dies_in} "
            f"nth={configuration.nth(dies_in)}"
            for rank, dies_in in deaths
        )
        yield Kill(phase, step, deaths, tuple(specs))


def _deaths(
    ranks: Sequence[int], phase: str, world_size: int
) -> Iterator[tuple[int, str]]:
    if phase != "recovery":
        yield from ((rank, phase) for rank in ranks)
    elif len(ranks) == 1:
        # While it recovers from the death of a rank two seats away.
        yield (ranks[0] + 2) % world_size, "backward"
        yield ranks[0], phase
    else:
        yield ranks[0], "backward"
        yield ranks[1], phase
