#!/usr/bin/env python3
"""Turn the table api.def into the C++ that a table can say.

    python csrc/proxy/generate.py csrc/proxy/api.def FOLDER

CMake runs it at build time (csrc/CMakeLists.txt); forward.h declares what the
generated code leans on. Nothing but the standard library is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from api_table import FORWARDED, Function, TableError, parse

FIRST_OPCODE = 256  # kFirstForward in forward.h
SCALAR_BYTES = {
    "scalar<float>": "4",
    "scalar<double>": "8",
    "scalar<float2>": "8",
    "scalar<double2>": "16",
    "scalar<compute>": "scalar_bytes_",
}
# The constants of cuda_abi.h for a missing handle and a missing scalar.
STATUS = {
    "cublas": ("kCublasNotInitialized", "kCublasInvalidValue"),
    "nccl": ("kNcclInvalidArgument", "kNcclInvalidArgument"),
}
CONSTANTS = {"cublas": "Library::kCublas", "nccl": "Library::kNccl"}

EXPORT = 'extern "C" __attribute__((visibility("default")))'
HEAD = "// Generated from csrc/proxy/api.def by generate.py; do not edit.\n"


def opcodes(forward: list[Function]) -> str:
    """The number, the type and the name of each forwarded function."""
    numbers = [f"  {f.name} = {FIRST_OPCODE + i},\n" for i, f in enumerate(forward)]
    types = [
        f"using {f.name} = int({', '.join(a.type for a in f.arguments)});\n"
        for f in forward
    ]
    rows = [f"  F({CONSTANTS[f.library]}, {f.name}) \\\n" for f in forward]
    return (
        f"{HEAD}#pragma once\n#include <complex>\n#include <cstddef>\n"
        "#include <cstdint>\n\nnamespace mnemosyne::proxy {\n"
        f"enum class Forward : uint16_t {{\n{''.join(numbers)}}};\n"
        f"namespace types {{\n{''.join(types)}}}  // namespace types\n"
        "}  // namespace mnemosyne::proxy\n\n"
        f"// F(library, name) for each.\n#define MNEMOSYNE_FORWARD(F) \\\n"
        f"{''.join(rows)}\n"
    )


def client_function(f: Function) -> str:
    """What the program calls instead of the library's function."""
    no_handle, no_scalar = STATUS[f.library]
    role = FORWARDED[f.library]
    handle = next(a.name for a in f.arguments if a.role == role)
    parameters = ", ".join(f"{a.type} {a.name}" for a in f.arguments)
    lines = [
        f"{EXPORT} int {f.name}({parameters}) noexcept {{",
        f"  if ({handle} == nullptr) return {no_handle};",
    ]
    for a in f.arguments:
        if a.role.startswith("scalar") or a.role == "info":
            lines.append(f"  if ({a.name} == nullptr) return {no_scalar};")
    if f.has("scalar") or f.has("result"):
        lines.append(f"  const auto mode_ = pointerMode({handle});")
    if f.has("result"):
        lines += [
            "  if (mode_ == CublasPointerMode::kHost) {",
            f'    noteUnsupported("{f.library}", "{f.name} (result on the host)");',
            "    return kCublasNotSupported;",
            "  }",
        ]
    if f.has("scalar<compute>"):
        lines += [
            "  const size_t scalar_bytes_ = scalarBytes(computeType, Ctype);",
            "  if (scalar_bytes_ == 0) {",
            f'    noteUnsupported("{f.library}", "{f.name} (type of computation)");',
            "    return kCublasNotSupported;",
            "  }",
        ]
    lines.append(f"  CommandWriter command_(uint16_t(Forward::{f.name}));")
    for a in f.arguments:
        if a.role == "cublas":
            lines.append(f"  putCublas(command_, {a.name});")
        elif a.role in ("comm", "stream"):
            lines.append(f"  command_.put({a.role}Id({a.name}));")
        elif a.role.startswith("scalar"):
            size = SCALAR_BYTES[a.role]
            lines.append(f"  Scalar::put(command_, mode_, {a.name}, {size});")
        elif a.role == "info":
            lines.append(f"  *{a.name} = 0;")
        else:
            lines.append(f"  command_.put({a.name});")
    lines += [f"  return postForward(command_, {CONSTANTS[f.library]});", "}\n"]
    return "\n".join(lines)


def server_function(f: Function) -> str:
    """What the server does with the command of `client_function`."""
    lines = [
        f"void {f.name}(CommandReader& reader_, GeneratedContext& context_) {{",
        f"  static const auto function_ = reinterpret_cast<types::{f.name}*>(",
        f'      context_.symbol({CONSTANTS[f.library]}, "{f.name}"));',
    ]
    passed = []
    for a in f.arguments:
        passed.append(a.name)
        if a.role == "cublas":
            lines.append(f"  void* const {a.name} = context_.cublas(reader_);")
        elif a.role in ("comm", "stream"):
            source = f"context_.{a.role}(reader_.get<uint32_t>())"
            lines.append(f"  void* const {a.name} = {source};")
        elif a.role.startswith("scalar"):
            lines.append(f"  const Scalar {a.name}(reader_);")
            pointee = a.type.removeprefix("const ").removesuffix("*")
            passed[-1] = f"{a.name}.as<{pointee}>()"
        elif a.role == "info":
            lines.append(f"  int {a.name} = 0;")
            passed[-1] = f"&{a.name}"
        else:
            lines.append(f"  const auto {a.name} = reader_.get<{a.type}>();")
    code = f"function_({', '.join(passed)})"
    lines += [
        f'  if (!reader_.atEnd()) throw ProtocolError("{f.name}: too long");',
        f"  int code_ = {f.value};  // if the library has no such function",
        f"  if (function_ != nullptr) code_ = {code};",
    ]
    for a in f.arguments:
        if a.role == "info":
            lines.append(f"  if (code_ == 0) code_ = {a.name};")
    failed = f'context_.failed({CONSTANTS[f.library]}, "{f.name}", code_)'
    lines += [f"  if (code_ != 0) {failed};", "}\n"]
    return "\n".join(lines)


def client_file(forward: list[Function]) -> str:
    """Everything the client forwards."""
    return (
        f'{HEAD}#include "generated_opcodes.h"\n#include "proxy/forward.h"\n\n'
        "using namespace mnemosyne::proxy;  // the exports have to be global\n\n"
        + "\n".join(map(client_function, forward))
    )


def server_file(forward: list[Function]) -> str:
    """The other end of `client_file`."""
    cases = "".join(
        f"    case Forward::{f.name}:\n"
        f"      run::{f.name}(reader, context);\n      return true;\n"
        for f in forward
    )
    return (
        f'{HEAD}#include "generated_opcodes.h"\n#include "proxy/forward.h"\n\n'
        "namespace mnemosyne::proxy {\nnamespace run {\nnamespace {\n\n"
        + "\n".join(map(server_function, forward))
        + "\n}  // namespace\n}  // namespace run\n\n"
        "bool executeGenerated(uint16_t opcode, CommandReader& reader,\n"
        "                      GeneratedContext& context) {\n"
        f"  switch (Forward{{opcode}}) {{\n{cases}  }}\n  return false;\n}}\n\n"
        "}  // namespace mnemosyne::proxy\n"
    )


def unsupported_file(functions: list[Function]) -> str:
    """Stubs. Their callers pass arguments, which the calling convention allows.

    They return a long, so that also who expects a pointer or a size gets all its bits.
    """
    stubs = "".join(
        f'{EXPORT} long {f.name}() {{\n  noteUnsupported("{f.library}", "{f.name}");\n'
        f"  return {f.value};\n}}\n"
        for f in functions
        if f.kind == "unsupported"
    )
    names = "".join(f'\n  "{f.name}\\n"' for f in functions if f.kind == "unsupported")
    return (
        f'{HEAD}#include "proxy/forward.h"\n\n'
        f"using mnemosyne::proxy::noteUnsupported;\n\n{stubs}"
        "// The names of all these, a line each.\n"
        f"{EXPORT} const char* mnemosyne_proxy_unsupported() {{\n  return{names};\n}}\n"
    )


def main(table: str, folder: str) -> None:
    """Write the four files."""
    functions = parse(Path(table).read_text())
    forward = [f for f in functions if f.kind == "forward"]
    files = {
        "generated_opcodes.h": opcodes(forward),
        "generated_client.cc": client_file(forward),
        "generated_server.cc": server_file(forward),
        "generated_unsupported.cc": unsupported_file(functions),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (Path(folder) / name).write_text(text)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TableError as error:
        sys.exit(str(error))
