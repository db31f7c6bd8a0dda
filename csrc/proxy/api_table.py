"""The table api.def: what the device proxy makes of each of NVIDIA's functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

CLASSES = ("client", "forward", "unsupported", "native")
# The type of an argument, by its role.
TYPES = {
    "cublas": "void*",
    "comm": "void*",
    "stream": "void*",
    "int": "int",
    "int64": "int64_t",
    "size": "size_t",
    "float": "float",
    "double": "double",
    "device": "void*",
    "scalar<float>": "const float*",
    "scalar<double>": "const double*",
    "scalar<float2>": "const std::complex<float>*",
    "scalar<double2>": "const std::complex<double>*",
    "scalar<compute>": "const void*",
    "result": "void*",
    "info": "int*",
}
# Libraries whose functions can be forwarded, and the argument that names the object.
FORWARDED = {"cublas": "cublas", "nccl": "comm"}


class TableError(ValueError):
    """A line of the table that says nothing, with its number."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"api.def:{line}: {message}")
        self.line = line


@dataclass(frozen=True)
class Argument:
    """One argument of a forwarded function."""

    role: str
    name: str

    @property
    def type(self) -> str:
        """Its type in C++; enumerations are int, handles are void*."""
        return TYPES[self.role]


@dataclass(frozen=True)
class Function:
    """One function of one of NVIDIA's libraries."""

    name: str
    library: str
    kind: str
    line: int
    value: int | None = None  # what it returns where it is not supported
    arguments: tuple[Argument, ...] = ()

    def has(self, role: str) -> bool:
        """Whether an argument has this role; `scalar` stands for all of its kind."""
        return any(role in (a.role, a.role.partition("<")[0]) for a in self.arguments)


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield each statement with the number of its first line."""
    number, statement = 0, ""
    for at, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].rstrip()
        if not line:
            continue
        if not line[0].isspace():
            if statement:
                yield number, statement
            number, statement = at, line
        elif statement:
            statement += " " + line.strip()
        else:
            raise TableError(at, "a line that continues nothing")
    if statement:
        yield number, statement


def parse(text: str) -> list[Function]:
    """Return all functions of the table, in its order."""
    functions: dict[str, Function] = {}
    library, code = "", None
    for line, statement in logical_lines(text):
        kind, _, rest = statement.partition(" ")
        if kind == "library":
            match = re.fullmatch(r"(\w+)(?: unsupported=(\d+))?", rest)
            if not match:
                raise TableError(line, "expected: library NAME [unsupported=CODE]")
            library, code = match[1], int(match[2]) if match[2] else None
            continue
        if kind not in CLASSES:
            raise TableError(line, f"unknown class {kind!r}; one of {CLASSES}")
        if not library:
            raise TableError(line, "a function before the first library")
        if not rest:
            raise TableError(line, f"{kind} what?")
        if kind == "forward":
            found = [parse_forward(line, library, code, rest)]
        else:
            found = [parse_name(line, library, kind, code, w) for w in rest.split()]
        for function in found:
            if function.name in functions:
                first = functions[function.name].line
                raise TableError(line, f"{function.name} stands in line {first} too")
            functions[function.name] = function
    return list(functions.values())


def parse_name(
    line: int, library: str, kind: str, code: int | None, word: str
) -> Function:
    """Parse `name` or, of an unsupported function, `name=value`."""
    match = re.fullmatch(r"([A-Za-z_]\w*)(?:=(-?\d+))?", word)
    if not match or (match[2] and kind != "unsupported"):
        raise TableError(line, f"not a name: {word!r}")
    value = int(match[2]) if match[2] else code
    if kind == "unsupported" and value is None:
        raise TableError(line, f"library {library} has no code for unsupported")
    return Function(match[1], library, kind, line, value)


def parse_forward(line: int, library: str, code: int | None, rest: str) -> Function:
    """Parse `name(role argument, ...)`."""
    if library not in FORWARDED or code is None:
        raise TableError(line, f"no function of {library} can be forwarded")
    match = re.fullmatch(r"([A-Za-z_]\w*)\((.*)\)", rest)
    if not match:
        raise TableError(line, "expected: forward NAME(ROLE ARGUMENT, ...)")
    arguments: list[Argument] = []
    for text in match[2].split(","):
        role, _, name = text.strip().partition(" ")
        if role not in TYPES or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise TableError(line, f"not an argument: {text.strip()!r}")
        if name in (a.name for a in arguments):
            raise TableError(line, f"two arguments are called {name}")
        arguments.append(Argument(role, name))
    function = Function(match[1], library, "forward", line, code, tuple(arguments))
    needed = FORWARDED[library]
    if sum(a.role == needed for a in arguments) != 1:
        raise TableError(line, f"a function of {library} has one {needed} argument")
    if (function.has("scalar") or function.has("result")) and library != "cublas":
        raise TableError(line, "only a cuBLAS handle has a pointer mode")
    names = {a.name for a in arguments if a.role == "int"}
    if function.has("scalar<compute>") and not {"computeType", "Ctype"} <= names:
        raise TableError(line, "scalar<compute> needs int computeType and int Ctype")
    return function
