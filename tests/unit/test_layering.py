"""Imports and includes go down only; docs/design.md section 4 has the levels."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mnemosyne_plugin"
CSRC = ROOT / "csrc"

LEVELS = (
    ("config", "errors", "events"),
    ("report",),  # level 0 as well, but it reads events
    ("ccl", "proxy"),
    ("state",),
    ("recovery",),
    ("data",),  # adapters have loaders of their own
    ("launch", "adapters"),
    ("autoload", "chaos", "megatron"),  # the last one: what its users import
    ("doctor",),  # asks autoload whether it is on
    ("cli",),  # starts chaos when the user asks for it
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

ONLY_IN = {
    "deepspeed": ("adapters",),
    "megatron": ("adapters",),
    "torch.distributed.elastic": ("launch",),
    "torch.distributed.distributed_c10d": ("ccl",),
    "mnemosyne_plugin.ccl._C": ("ccl",),
}
PURE = ("recovery/membership.py", "recovery/commit.py", "state/plan.py")
PURE_NEVER_IMPORTS = {
    *("torch", "os", "io", "time", "socket", "threading", "random", "subprocess"),
    *("pathlib", "select", "selectors", "signal", "datetime"),
}
BAD_NAMES = {"util", "utils", "helper", "helpers", "misc", "base", "core", "v2"}
TORCH_FILES = ("backend", "bindings", "verbs")  # how their names begin


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def sources() -> list[Path]:
    return sorted(path for end in ("*.h", "*.cc") for path in CSRC.rglob(end))


def part_of(path: Path) -> str:
    """Return the part of the package that a module belongs to, as in LEVELS."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of all that a module imports, also inside functions."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*up, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the front door may name anything; others never import it
    level = LEVEL_OF[part]
    for name in imports(path):
        if not within(name, PACKAGE.name):
            continue
        target = (name.split(".") + [""])[1]
        if target in ("", "__version__", part):
            continue
        assert target in LEVEL_OF, f"{path} imports the front door: {name}"
        allowed = level == 0 or LEVEL_OF[target] < level
        assert allowed, f"{path} (level {level}) imports {name}, which is not below"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_trainers_and_torch_internals_stay_in_their_part(path: Path) -> None:
    for name in imports(path):
        for module, parts in ONLY_IN.items():
            if within(name, module):
                assert part_of(path) in parts, f"{path} imports {name}"


@pytest.mark.parametrize("name", PURE)
def test_decision_rules_have_no_io_no_clock_no_torch(name: str) -> None:
    roots = {module.split(".")[0] for module in imports(PACKAGE / name)}
    assert not roots & PURE_NEVER_IMPORTS


def test_production_code_never_imports_chaos() -> None:
    # cli starts chaos when the user asks for it; nothing else may know it.
    for path in modules():
        if part_of(path) not in ("chaos", "cli"):
            assert not any(within(n, "mnemosyne_plugin.chaos") for n in imports(path))


def test_every_file_is_named_after_what_it_holds() -> None:
    for path in [*modules(), *sources()]:
        named = {path.stem, path.parent.name}
        assert not named & BAD_NAMES, f"{path}: a name that says nothing"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_go_down_only(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    for quote, name in re.findall(r'^#include ([<"])([^>"]+)', path.read_text(), re.M):
        if quote == "<":
            foreign = re.match(r"(torch|ATen|c10|pybind11|Python\.h)", name)
            assert not foreign or path.name.startswith(TORCH_FILES), f"{path}: <{name}>"
            assert not re.match(r"(cuda|nccl)", name), f"{path}: <{name}>"
        elif folder == "common":
            assert name.startswith("common/") or "/" not in name, f"{path}: {name}"
        else:
            other = {"ccl": "proxy/", "proxy": "ccl/"}[folder]
            assert not name.startswith(other), f"{path}: {name}"


def test_size_table() -> None:
    """Prints, never fails: sizes are for the reader to judge (pytest -s)."""
    for title, files in (("python", modules()), ("c++", sources())):
        sizes = {path: len(path.read_text().splitlines()) for path in files}
        print(f"\n{title}: {sum(sizes.values())} lines in {len(sizes)} files")
        for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{size:6d}  {path.relative_to(ROOT)}")
