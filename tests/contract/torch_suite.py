"""Runs the tests that torch ships for its backends, in workers that stay.

Torch's own runner starts new processes for each test and takes an hour. Here the same
test functions run in the workers of a World: each gets a fresh default group, and the
mesh a new epoch if the test has left a failure behind.

The shipped file asks for "gloo" by name in a hundred places, so it is told that its
backend is gloo, and our intercept serves that name, as in a user's job. Marks by which
torch skips a test for gloo, or for less than eight ranks, are not heeded: what only MPI
has been asked for until now, such as all-to-all, is run too.
"""

import ast
import functools
import io
import os
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
import torch.distributed as dist
from world import Worker

from mnemosyne_plugin.ccl import intercept

SOURCE = Path(torch.__file__).parent.joinpath(
    "testing", "_internal", "distributed", "distributed_test.py"
)
BARRIER_S = 10.0


@dataclass(frozen=True)
class Outcome:
    kind: str  # "passed", "skipped" or "failed"
    why: str = ""


def shipped_tests() -> list[str]:
    """Return the names of all shipped tests, without importing them."""
    tree = ast.parse(SOURCE.read_text())
    classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    body = classes["_DistTestBase"].body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("test_")]


def set_up(worker: Worker, port: int, folder: str) -> None:
    """Prepare a worker: ``port`` is that of the parent's store."""
    intercept.serve_process_groups(lambda: False)
    os.environ |= {
        "WORLD_SIZE": str(worker.size),
        "TEMP_DIR": folder,
        "INIT_METHOD": f"file://{folder}/init",
        "MASTER_ADDR": "127.0.0.1",
    }
    worker.kept["store"] = dist.TCPStore("127.0.0.1", port, is_master=False)


def run_shipped(worker: Worker, name: str, number: int) -> Outcome:
    """Run one test on this rank; ``number`` is that of the run, equal on all ranks."""
    test = _instance(worker, name, number, _suite(worker))
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"run{number}", worker.kept["store"]),
        rank=worker.rank,
        world_size=worker.size,
        timeout=timedelta(seconds=20),
    )
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            test._barrier()
            _unmarked(test, name)()
            test._barrier()
        return Outcome("passed")
    except SkipTest as skip:
        return Outcome("skipped", str(skip))
    except SystemExit as leave:
        return Outcome("skipped", f"left with code {leave.code}")
    except BaseException:
        return Outcome("failed", traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _suite(worker: Worker) -> Any:
    if "suite" not in worker.kept:
        os.environ["BACKEND"] = "gloo"
        from torch.testing._internal.distributed import distributed_test

        os.environ["BACKEND"] = "mpi"  # the one that torch asks of any world size
        distributed_test.PROFILING_SUPPORTED_BACKENDS.append("mnemosyne")
        distributed_test.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.append("mnemosyne")
        worker.kept["suite"] = distributed_test
    return worker.kept["suite"]


def _unmarked(test: Any, name: str) -> Any:
    """Return the test without what ``unittest.skip`` has put around it."""
    function = getattr(type(test), name)
    while function.__code__.co_name == "skip_wrapper":
        function = function.__wrapped__
    return functools.partial(function, test)


def _instance(worker: Worker, name: str, number: int, suite: Any) -> Any:
    store = worker.kept["store"]
    passed = 0

    class Shipped(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        def _barrier(self, wait_for: Any = None, timeout: float = BARRIER_S) -> None:
            nonlocal passed
            passed += 1
            key = f"barrier{number}.{passed}"
            if store.add(key, 1) == (wait_for or worker.size):
                store.set(f"{key}.done", "")
            store.wait([f"{key}.done"], timedelta(seconds=timeout))

    test = Shipped(name)
    test.rank = worker.rank
    test.file_name = f"{os.environ['TEMP_DIR']}/file{number}"
    return test
