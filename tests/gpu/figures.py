"""What the checks have found out: printed at once, and written to a file.

MNEMOSYNE_WRITE_RESULTS names the folder of the file, which has what there is so far at
any time.
"""

import os
import re
from datetime import date
from pathlib import Path

from on_gpu import device_name


class Figures:
    """A table of what was measured or seen."""

    def __init__(self) -> None:
        folder = os.environ.get("MNEMOSYNE_WRITE_RESULTS", "")
        self.rows: list[tuple[str, str]] = []
        self.name = device_name()
        self.today = date.today().isoformat()
        self.path: Path | None = None
        if folder:
            short = re.sub(r"[^A-Za-z0-9]+", "_", self.name.split(", ")[0]).lower()
            self.path = Path(folder) / f"gpu_{short}_{self.today}.md"

    def add(self, what: str, value: object) -> None:
        """Keep and print a line."""
        if isinstance(value, list | tuple | set):
            value = ", ".join(map(str, value))
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        print(f"=== {what}: {text}", flush=True)
        self.rows.append((what, text))
        if self.path is not None:
            self.path.write_text(self.text())

    def text(self) -> str:
        """Return all of it as Markdown."""
        lines = [f"| {what} | {value} |" for what, value in self.rows]
        return "\n".join(
            [
                f"# The device proxy on a GPU, {self.today}",
                "",
                f"{self.name}. Command: `make test-gpu`.",
                "",
                "| what | seen |",
                "|---|---|",
                *lines,
                "",
            ]
        )
