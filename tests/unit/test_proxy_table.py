"""The table of the device proxy, csrc/proxy/api.def, and what is made of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from api_table import TableError, parse
from generate import main as generate

ROOT = Path(__file__).resolve().parents[2]
PROXY = ROOT / "csrc" / "proxy"
TABLE = PROXY / "api.def"
IMPORTS = Path(__file__).with_name("torch_imports.txt")


def imports_of_torch() -> dict[str, set[str]]:
    """Return what each version of torch imports."""
    names: dict[str, set[str]] = {}
    versions: list[str] = []
    for line in IMPORTS.read_text().splitlines():
        if line.startswith("["):
            versions = line.strip("[]").split()
        elif not line.startswith("#"):
            for version in versions:
                names.setdefault(version, set()).update(line.split())
    return names


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", PROXY / "check_api.py", *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=50
    )


def build_library(path: Path, source: str) -> None:
    subprocess.run(
        ["c++", "-x", "c", "-shared", "-fPIC", "-o", str(path), "-"],
        input=source,
        text=True,
        check=True,
        timeout=50,
    )


@pytest.mark.parametrize("version", ["2.11", "2.12", "2.13"])
def test_every_function_that_torch_imports_has_a_class(version: str) -> None:
    table = {function.name for function in parse(TABLE.read_text())}
    imported = imports_of_torch()[version]
    assert len(imported) > 700
    assert imported - table == set()


def test_what_a_training_step_forwards_is_forwarded() -> None:
    kinds = {function.name: function.kind for function in parse(TABLE.read_text())}
    for name in ("cublasGemmEx", "cublasGemmStridedBatchedEx", "ncclAllReduce"):
        assert kinds[name] == "forward"
    assert kinds["cublasLtMatmul"] == kinds["__cudaLaunchKernel"] == "client"


def test_a_statement_goes_on_in_lines_that_begin_with_a_blank() -> None:
    # given
    text = (
        "# what follows\n"
        "library nccl unsupported=5\n"
        "\n"
        "forward ncclBcast(device buff, size count,  # of elements\n"
        "    comm comm, stream stream)\n"
        "unsupported one\n"
        "  two=-1\n"
        "native three\n"
    )
    # when
    bcast, one, two, three = parse(text)
    # then
    assert [argument.name for argument in bcast.arguments] == [
        *("buff", "count", "comm", "stream")
    ]
    assert [argument.type for argument in bcast.arguments] == [
        *("void*", "size_t", "void*", "void*")
    ]
    assert (bcast.line, one.line, two.line, three.line) == (4, 6, 6, 8)
    assert (one.value, two.value) == (5, -1)
    assert three.kind == "native"


@pytest.mark.parametrize(
    "statement",
    [
        "proxied cublasCreate_v2",
        "client",
        "client cublasCreate_v2,",
        "client cublasCreate_v2=1",
        "client twice\nclient twice",
        "library cublas supported=15",
        "library nvrtc\nunsupported nvrtcVersion",
        "library cudart unsupported=801\nforward cudaMalloc(device p, size n)",
        "forward cublasSgemm_v2",
        "forward cublasSgemm_v2(cublas handle",
        "forward cublasSgemm_v2(cublas handle, integer m)",
        "forward cublasSgemm_v2(cublas handle, int)",
        "forward cublasSgemm_v2(cublas handle, int m, int m)",
        "forward cublasSgemm_v2(int m)",
        "forward cublasSgemm_v2(cublas handle, cublas other)",
        "forward cublasSgemm_v2(cublas handle, scalar<half> alpha)",
        "forward cublasGemmEx(cublas handle, scalar<compute> alpha, int Ctype)",
        "library nccl unsupported=5\nforward ncclSend(comm c, scalar<float> x)",
    ],
)
def test_a_malformed_line_is_named_by_its_number(statement: str) -> None:
    # given
    text = "# a comment\nlibrary cublas unsupported=15\n\n" + statement
    # when
    with pytest.raises(TableError) as error:
        parse(text)
    # then
    assert error.value.line == len(text.splitlines())


def test_a_table_begins_with_a_library() -> None:
    for text in ("client one\nlibrary cuda", "  one\nlibrary cuda"):
        with pytest.raises(TableError) as error:
            parse(text)
        assert error.value.line == 1


def test_the_generator_numbers_the_forwarded_functions_from_256(
    tmp_path: Path,
) -> None:
    # when
    generate(str(TABLE), str(tmp_path / "one"))
    generate(str(TABLE), str(tmp_path / "two"))
    # then
    forward = [f.name for f in parse(TABLE.read_text()) if f.kind == "forward"]
    header = (tmp_path / "one" / "generated_opcodes.h").read_text()
    numbers = re.findall(r"^  (\w+) = (\d+),$", header, re.MULTILINE)
    assert numbers == [(name, str(256 + i)) for i, name in enumerate(forward)]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_build_stops_at_a_malformed_table(tmp_path: Path) -> None:
    # given
    table = tmp_path / "api.def"
    table.write_text("library cublas unsupported=15\nclient a-b\n")
    # when
    ended = subprocess.run(
        [sys.executable, "-B", PROXY / "generate.py", table, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=50,
    )
    # then
    assert ended.returncode == 1
    assert "api.def:2:" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_check_names_what_a_new_torch_imports_and_the_table_lacks(
    tmp_path: Path,
) -> None:
    # given a torch that calls one function that is known, and two that are not
    folder = tmp_path / "torch" / "lib"
    header = tmp_path / "torch" / "include/c10/cuda/driver_api.h"
    for parent in (folder, header.parent):
        parent.mkdir(parents=True)
    call = "void cublasSgemm_v2(); void ncclNew(); void f() { cublasSgemm_v2(); %s }"
    build_library(folder / "libtorch_cuda.so", call % "ncclNew();")
    header.write_text("  _(cuMemCreate, 12000) \\\n  _(cuMemNew, 13000)\n")
    # when
    printed = check(folder)
    # then
    assert printed.returncode == 1
    assert "missing in the table 2\n  cuMemNew\n  ncclNew\n" in printed.stdout
    listed = check("--imports", folder).stdout.split()
    assert listed == ["cuMemCreate", "cuMemNew", "cublasSgemm_v2", "ncclNew"]

    # when it calls the known one alone
    build_library(folder / "libtorch_cuda.so", call % "")
    header.unlink()
    # then
    assert check(folder).returncode == 0


def test_the_check_refuses_a_torch_without_cuda(tmp_path: Path) -> None:
    ended = check(tmp_path)
    assert ended.returncode == 1
    assert str(tmp_path) in ended.stderr


def test_the_check_names_what_the_client_does_not_export(tmp_path: Path) -> None:
    # given a client with all but one function of the table
    functions = parse(TABLE.read_text())
    ours = [f.name for f in functions if f.kind != "native" and f.name != "cudaMalloc"]
    source = "".join(f"void {name}() {{}}\n" for name in ours)
    client = tmp_path / "libmnemosyne_client.so"
    # when
    build_library(client, source)
    ended = check("--client", client)
    # then
    assert ended.returncode == 1
    assert ended.stdout == "not exported: cudaMalloc\n"

    # when it has that one, and another that is NVIDIA's
    build_library(client, source + "void cudaMalloc() {}\nvoid nvrtcVersion() {}\n")
    ended = check("--client", client)
    # then
    assert ended.returncode == 1
    assert ended.stdout.startswith("exported,")
    assert "nvrtcVersion" in ended.stdout
