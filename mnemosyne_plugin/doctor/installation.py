"""What is installed, without importing it: trainers, and what they compute with."""

import re
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from mnemosyne_plugin.doctor.findings import Package

_OURS = "mnemosyne-plugin"


def packages() -> tuple[Package, ...]:
    """Return those that ``import`` would find. None of them is imported."""
    return tuple(_packages())


def torch_built_for() -> str:
    """Return the torch that the extension was built for; "" if nothing says so."""
    try:
        required = metadata.requires(_OURS) or []
    except metadata.PackageNotFoundError:
        return ""  # a source tree
    for line in required:
        if found := re.match(r"torch\s*==\s*([\w.]+)", line):
            return found.group(1)
    return ""


def has_extension() -> bool:
    """Whether there is a file of it that this python would load."""
    folder = Path(__file__).parents[1] / "ccl"
    return any((folder / f"_C{end}").exists() for end in EXTENSION_SUFFIXES)


def folders(module: str) -> list[Path]:
    """Return where a top-level module's files are; none if there is no such module."""
    spec = find_spec(module)
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin).parent] if spec.origin else []


def _packages() -> Iterator[Package]:
    if folders("deepspeed"):
        yield Package(name="DeepSpeed", version=_version("deepspeed"))
    yield from _megatron()
    if where := folders("apex"):
        # Another project on PyPI has the name, and no optimizers.
        is_other = not any((place / "optimizers").is_dir() for place in where)
        yield Package(name="NVIDIA's apex", version=_version("apex"), is_other=is_other)
    if folders("transformer_engine"):
        yield Package(name="Transformer Engine", version=_version("transformer-engine"))


def _megatron() -> Iterator[Package]:
    """Core and training may lie in two places: a wheel, and a source tree before it."""
    places = folders("megatron")
    with_core = [place for place in places if (place / "core").is_dir()]
    if with_core:
        yield Package(name="megatron.core", version=_version_of_core(with_core[0]))
    for place in places:
        arguments = place / "training" / "arguments.py"
        if arguments.is_file():
            core = place if place in with_core else next(iter(with_core), place)
            yield Package(
                name="Megatron-LM",
                version=_version_of_core(core),
                is_patched="mnemosyne" in arguments.read_text(errors="replace"),
            )
            return


def _version_of_core(place: Path) -> str:
    """Read it in the files that would be imported: the wheel may be another's."""
    try:
        text = (place / "core" / "package_info.py").read_text()
    except OSError:
        return _version("megatron-core")
    assigned: list[tuple[str, str]] = re.findall(r"^(\w+) *= *([\w\"'.]+)", text, re.M)
    parts = {name: value.strip("\"'") for name, value in assigned}
    numbers = [parts.get(name, "") for name in ("MAJOR", "MINOR", "PATCH")]
    if not all(number.isdecimal() for number in numbers):
        return _version("megatron-core")
    return ".".join(numbers) + parts.get("PRE_RELEASE", "")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
