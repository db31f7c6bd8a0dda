"""Prints what became of the cells."""

from collections import Counter
from collections.abc import Mapping, Sequence

from matrix.runs import Result

_FIRST = 40
_WIDTH = 17


class Table:
    """One row per configuration and victim, one column per phase; notes below."""

    def __init__(self, phases: Sequence[str]) -> None:
        self._phases = phases
        self._notes: dict[str, int] = {}
        self.counts: Counter[str] = Counter()

    def head(self) -> str:
        return self._line("configuration, victim", self._phases)

    def row(self, name: str, results: Mapping[str, Result]) -> str:
        """Return a line; cells that were not run because they make no sense are -."""
        self.counts.update(result.word for result in results.values())
        cells = [self._cell(results.get(phase)) for phase in self._phases]
        return self._line(name, cells)

    def foot(self) -> str:
        """Return the notes and the counts."""
        notes = [f"[{number}] {reason}" for reason, number in self._notes.items()]
        counts = ", ".join(f"{n} {word}" for word, n in sorted(self.counts.items()))
        return "\n".join([*notes, f"{self.counts.total()} cells: {counts}"])

    def _cell(self, result: Result | None) -> str:
        if result is None:
            return "-"
        if not result.reason:
            return result.word
        number = self._notes.setdefault(result.reason, len(self._notes) + 1)
        return f"{result.word} [{number}]"

    def _line(self, first: str, cells: Sequence[str]) -> str:
        return f"{first:{_FIRST}}" + "".join(f"{c:{_WIDTH}}" for c in cells).rstrip()
