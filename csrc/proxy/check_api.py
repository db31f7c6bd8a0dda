#!/usr/bin/env python3
"""Hold the table api.def against what a CUDA build of torch imports.

    python csrc/proxy/check_api.py [FOLDER ...]           the lib folders of torches
    python csrc/proxy/check_api.py --imports FOLDER       print what one imports
    python csrc/proxy/check_api.py --client LIBRARY       hold our client against it

Without a folder it takes the torch that is installed. It prints what the table lacks,
and what it has that none of them imports: Triton and others look functions up by name.
Ends with 1 if something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from api_table import Function, parse

TABLE = Path(__file__).with_name("api.def")
# How the C functions of NVIDIA's libraries begin; torch's own are C++.
NVIDIA = re.compile(
    r"(__cuda|cuda|cu|cublas|cublasLt|cudnn|cusparse|cusparseLt|cusolver|cuFile"
    r"|curand|cupti|nccl|nvrtc|nvJitLink)[A-Z]\w*|(cufft|nvrtc|nvshmem|nvml)\w+"
)
# c10/cuda/driver_api.h lists what it asks the runtime for as _(name, version).
LOOKED_UP = re.compile(r"_\((cu[A-Z]\w+), *\d+")


def symbols(library: Path, which: str) -> set[str]:
    """Return the names that nm finds, without their versions."""
    output = subprocess.run(
        ["nm", "-D", f"--{which}-only", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {line.split()[-1].partition("@")[0] for line in output.splitlines() if line}


def imports(folder: Path) -> set[str]:
    """Return NVIDIA's functions that the libraries in torch's lib folder need."""
    if not (folder / "libtorch_cuda.so").exists():
        raise SystemExit(f"no CUDA build of torch in {folder}: no libtorch_cuda.so")
    names: set[str] = set()
    for library in sorted(folder.glob("*.so*")):
        names |= symbols(library, "undefined")
    header = folder.parent / "include/c10/cuda/driver_api.h"
    if header.exists():
        names |= set(LOOKED_UP.findall(header.read_text()))
    return {name for name in names if NVIDIA.fullmatch(name)}


def installed_torch() -> Path:
    """Return the lib folder of the torch that this Python would import."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed; give the path of its lib folder")
    return Path(spec.origin).parent / "lib"


def check_torch(functions: list[Function], folders: list[Path]) -> bool:
    """Print the differences; return whether the table has all that is imported."""
    table = {f.name for f in functions}
    imported: set[str] = set()
    complete = True
    for folder in folders:
        found = imports(folder)
        imported |= found
        missing = sorted(found - table)
        complete = complete and not missing
        print(f"{folder}: imports {len(found)}, missing in the table {len(missing)}")
        for name in missing:
            print(f"  {name}")
    unused = sorted(table - imported)
    print(f"in the table, imported by none of them: {len(unused)}")
    for name in unused:
        print(f"  {name}")
    return complete


def check_client(functions: list[Function], library: Path) -> bool:
    """Print what the client should export and does not, and the reverse."""
    exported = symbols(library, "defined")
    ours = {f.name for f in functions if f.kind != "native"}
    native = {f.name for f in functions if f.kind == "native"}
    absent = sorted(ours - exported)
    foreign = sorted(exported & native)
    for name in absent:
        print(f"not exported: {name}")
    for name in foreign:
        print(f"exported, though the table leaves it to NVIDIA's library: {name}")
    return not absent and not foreign


def main() -> int:
    """Run the check that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--client", type=Path, metavar="LIBRARY")
    options = parser.parse_args()
    functions = parse(TABLE.read_text())
    if options.client and not options.folders:
        return 0 if check_client(functions, options.client) else 1
    folders = options.folders or [installed_torch()]
    if options.imports:
        print(*sorted(set().union(*map(imports, folders))), sep="\n")
        return 0
    complete = check_torch(functions, folders)
    if options.client:
        complete = check_client(functions, options.client) and complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
