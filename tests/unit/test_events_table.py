"""docs/operations.md has a row for each event that the code writes, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mnemosyne_plugin"
_ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| [^|]* \|$", re.MULTILINE)


def emitted() -> set[str]:
    """Return the names that are given to ``emit``; each has to be a literal."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            method = getattr(call.func, "attr", "")
            if method not in ("emit", "_emit"):
                continue
            name = call.args[0]
            if isinstance(name, ast.Constant):
                names.add(name.value)
            else:  # Agent._emit, which adds the facts of a worker
                assert path.name == "agent.py", f"{path}:{call.lineno}: no literal"
    return names


def documented() -> list[str]:
    text = (ROOT / "docs" / "operations.md").read_text()
    watch = text.partition("\n## Watch\n")[2].partition("\n## ")[0]
    return _ROW.findall(watch)


def test_each_event_has_one_row_in_the_table_of_operations() -> None:
    rows = documented()
    assert sorted(rows) == sorted(emitted())
    assert len(rows) > 15  # the pattern still finds the table's rows
