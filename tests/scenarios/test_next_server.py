"""What takes the place of a lost device's server: the spare, on some device."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mnemosyne_plugin.proxy import preload

SCRIPT = Path(__file__).parent / "scripts" / "proxy_client.py"
PATIENCE_S = 20


class Client:
    """A program that uses the emulated device as it is told."""

    def __init__(self, options: str = "") -> None:
        environment = os.environ | {
            "MNEMOSYNE_PROXY_DEVICE": "emulated",
            "MNEMOSYNE_EMULATED": options,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-S", SCRIPT],
            env=environment | preload(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, line: str) -> int:
        """Return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def servers(self) -> set[int]:
        """Return its server, and the spare."""
        return {pid for pid in children(self._process.pid) if is_running_server(pid)}

    def spare(self) -> int:
        """Return the one that is not in use."""
        (pid,) = self.servers() - {self.do("server")}
        return pid

    def end(self) -> int:
        """Close its input; return its exit code."""
        self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        with self._process:  # closes the pipes, and waits
            pass


def children(parent: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == parent:
            found.add(int(path.parent.name))
    return found


def is_running_server(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/exe").endswith("/mnemosyne-proxy")
    except OSError:
        return False  # ended; a zombie has no program any more


def wait_for_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], PATIENCE_S)[0], "it does not end"


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.kill()


def test_a_recovery_takes_the_spare_and_starts_the_next(client: Client) -> None:
    assert client.do("allocate") == 0
    first, spare = client.do("server"), client.spare()
    assert client.do("lose") != 0
    assert client.do("recover") == 0
    assert client.do("server") == spare
    assert client.spare() not in (first, spare)
    assert client.do("allocate") == 0


def test_a_program_that_only_counts_devices_has_no_spare(client: Client) -> None:
    assert client.do("count") == 0
    assert client.servers() == {client.do("server")}


def test_a_spare_that_has_died_is_replaced_by_a_fresh_server(client: Client) -> None:
    assert client.do("allocate") == 0
    first, spare = client.do("server"), client.spare()
    with ExitStack() as stack:
        pidfd = os.pidfd_open(spare)
        stack.callback(os.close, pidfd)
        os.kill(spare, signal.SIGKILL)
        wait_for_end(pidfd)
    assert client.do("allocate") == 0  # it was in nobody's way
    assert client.do("lose") != 0
    assert client.do("recover") == 0
    assert client.do("server") not in (first, spare)
    assert len(client.servers()) == 2
    assert not Path(f"/proc/{spare}").exists()  # nor is a zombie left of it


def test_a_spare_begins_with_the_environment_of_that_moment(client: Client) -> None:
    assert client.do("allocate") == 0
    before = client.do("memory")
    spare = client.spare()
    for options, expected in (("memory=96m", 96 << 20), ("memory=8g", before)):
        assert client.do(f"set {options}") == 0
        assert client.do("lose") != 0
        assert client.do("recover") == 0
        assert client.do("server") == spare
        assert client.do("memory") == expected
        spare = client.spare()


def test_a_recovery_waits_for_memory_that_the_driver_gives_back_late(
    client: Client,
) -> None:
    assert client.do("allocate") == 0
    assert client.do("set full_ms=500") == 0
    assert client.do("lose") != 0
    assert client.do("recover") == 0
    assert client.do("fill 64") == 0


def test_a_server_finds_the_libraries_that_the_program_has_loaded(
    client: Client, tmp_path: Path
) -> None:
    library = tmp_path / "libcudart.so.13"
    build = ["cc", "-shared", "-x", "c", "/dev/null", "-o", library]
    subprocess.run(build, check=True, timeout=PATIENCE_S)
    assert client.do(f"load {library}") == 0
    assert client.do("allocate") == 0
    variables = Path(f"/proc/{client.do('server')}/environ").read_bytes().split(b"\0")
    (path,) = (each for each in variables if each.startswith(b"LD_LIBRARY_PATH="))
    assert bytes(tmp_path) in path.split(b"=", 1)[1].split(b":")


def test_no_server_is_left_by_a_program_that_ends(client: Client) -> None:
    assert client.do("allocate") == 0
    servers = client.servers()
    assert len(servers) == 2
    assert client.end() == 0
    assert not [pid for pid in servers if is_running_server(pid)]


def test_no_server_is_left_by_a_program_that_is_killed(client: Client) -> None:
    assert client.do("allocate") == 0
    # A fork of it, as a data loader's worker, holds no end of theirs.
    fork = client.do("fork")
    with ExitStack() as stack:
        stack.callback(os.kill, fork, signal.SIGKILL)
        pidfds = [os.pidfd_open(pid) for pid in client.servers()]
        assert len(pidfds) == 2
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
        client.kill()
        for pidfd in pidfds:
            wait_for_end(pidfd)


def test_a_trace_of_commands_begins_when_it_is_asked_for(client: Client) -> None:
    assert client.do("allocate") == 0
    assert client.do("fill 64") == 0
    assert client.do("trace") == 0
    traces = []
    for lines in (["fill 64"], ["fill 64"], ["fill 64", "fill 64"]):
        assert [client.do(line) for line in lines] == [0] * len(lines)
        traces.append(client.do("trace"))
    assert traces[0] == traces[1] != traces[2]
    assert 0 not in traces


# Devices are claimed on the whole machine, so no two tests may have the same ones.
SERIAL = os.getpid() % 100_000 * 10


def machine(number: int, num_devices: int) -> str:
    return f"devices={num_devices},serial={SERIAL + 3 * number}"


@pytest.fixture
def start() -> Iterator[Callable[[str], Client]]:
    with ExitStack() as stack:

        def make(options: str) -> Client:
            made = Client(options)
            stack.callback(made.kill)
            return made

        yield make


def test_a_device_that_is_gone_is_replaced_by_one_that_nobody_uses(
    start: Callable[[str], Client],
) -> None:
    options = machine(0, num_devices=3)
    client, other = start(options), start(options)
    assert client.do("allocate") == 0
    assert other.do("choose 1") == 0
    assert other.do("allocate") == 0
    assert client.do("serial 0") == SERIAL
    assert client.do(f"set {options},fault=lost_device,server=1") == 0
    for _ in range(2):  # the second loss finds it where it is by then
        assert client.do("lose") != 0
        assert client.do("recover") == 0
        assert client.do("serial 0") == SERIAL + 2
        assert client.do("serial 1") == SERIAL + 1
    # Its number stays, and so does how many there are.
    assert client.do("devices") == 3
    assert client.do("allocate") == 0
    assert other.do("serial 1") == SERIAL + 1
    assert other.do("allocate") == 0


def test_a_device_that_another_process_uses_replaces_none(
    start: Callable[[str], Client],
) -> None:
    options = machine(1, num_devices=2)
    client, other = start(options), start(options)
    assert client.do("allocate") == 0
    assert other.do("choose 1") == 0
    assert other.do("allocate") == 0
    assert client.do(f"set {options},fault=lost_device,server=1") == 0
    assert client.do("lose") != 0
    assert client.do("recover") == 100  # no device
    assert other.do("allocate") == 0


def test_two_processes_may_share_a_device(start: Callable[[str], Client]) -> None:
    clients = [start(machine(2, num_devices=1)) for _ in range(2)]
    for client in clients * 2:
        assert client.do("allocate") == 0
        assert client.do("lose") != 0
        assert client.do("recover") == 0
