"""A job of real processes on this host, with verbs for what a test does to it."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemosyne_plugin.events import Event, read_events

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "examples" / "deepspeed_gpt" / "train.py"
CONFIGS = ROOT / "configs"
MARKER = "MNEMOSYNE_TEST_JOB"
POLL_S = 0.02
GONE_WITHIN_S = 2.0
"""A worker that the kernel kills with its agent is gone long before this."""


@dataclass(kw_only=True)
class LocalCluster:
    """Runs a script under ``mnemosyne run``: one agent, or several on this host.

    Everything that the job writes lies below ``folder``. A context manager: at its
    exit nothing of the job is alive, whatever happened, and ``check_nothing_is_left``
    fails the test if the job itself had left something.
    """

    folder: Path
    script: Path = TRAIN
    script_args: Sequence[str] = ()
    num_agents: int = 1
    procs_per_agent: int = 4
    num_standbys: int = 1
    preload: Sequence[str] = ("torch._dynamo", "deepspeed")
    """To save time: most of a short job is imports, else made by each worker."""
    chaos: Sequence[str] = ()
    launch_args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> "LocalCluster":
        self.run_dir = self.folder / "run"
        self.loss_log = self.folder / "losses.txt"
        self.final_state = self.folder / "final.txt"
        self.output_file = self.folder / "output.txt"
        self._temp = self.folder / "tmp"
        self._temp.mkdir(parents=True)
        self._job = secrets.token_hex(8)
        self._shared_memory = set(os.listdir("/dev/shm"))
        port = str(free_port())
        for agent in range(self.num_agents):
            self.agents.append(self._start_agent(agent, port))
        return self

    def _start_agent(self, agent: int, port: str) -> "subprocess.Popen[bytes]":
        nodes = [f"--nnodes={self.num_agents}", f"--node-rank={agent}"]
        nodes += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [
            str(Path(sys.executable).with_name("mnemosyne")),
            "run",
            *(nodes if self.num_agents > 1 else ["--standalone"]),
            f"--nproc-per-node={self.procs_per_agent}",
            f"--standby={self.num_standbys}",
            f"--run-dir={self.run_dir}",
            *(f"--preload={name}" for name in self.preload),
            *(f"--chaos={spec}" for spec in self.chaos),
            *self.launch_args,
            str(self.script),
            *self.script_args,
        ]
        own = {MARKER: self._job, "TMPDIR": str(self._temp), "OMP_NUM_THREADS": "1"}
        own["DS_ACCELERATOR"] = "cpu"  # as the scripts say, but later than --preload
        # torch makes this folder when imported, and means to keep it.
        own["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "inductor")
        with self.output_file.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, **self.env},
                start_new_session=True,
            )

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            send_signal(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait(timeout=10)

    # What a test does

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> int:
        """Kill the worker that holds a rank now; return its pid."""
        pid = self.pid(rank)
        os.kill(pid, signum)
        return pid

    def wait_until(
        self, happened: Callable[["LocalCluster"], object], timeout_s: float = 30.0
    ) -> None:
        """Return as soon as it happened; fail if the job ends or time is over."""
        deadline = time.monotonic() + timeout_s
        while not happened(self):
            ended = all(agent.poll() is not None for agent in self.agents)
            if ended and not happened(self):
                raise AssertionError(f"the job ended before\n{self.output()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {timeout_s} s\n{self.output()}")
            time.sleep(POLL_S)

    def wait_for_step(self, step: int, timeout_s: float = 30.0) -> None:
        """Return once some rank has finished a step."""
        wanted = f"{step} "
        self.wait_until(
            lambda cluster: any(
                line.startswith(wanted) for line in lines(cluster.loss_log)
            ),
            timeout_s,
        )

    def wait(self, timeout_s: float = 60.0) -> list[int]:
        """Wait for the end of the job; return each agent's exit code."""
        deadline = time.monotonic() + timeout_s
        try:
            return [a.wait(max(deadline - time.monotonic(), 0)) for a in self.agents]
        except subprocess.TimeoutExpired:
            text = f"the job did not end in {timeout_s} s\n{self.output()}"
            raise AssertionError(text) from None

    # What a test sees

    def events(self, name: str | None = None) -> list[Event]:
        """Return what happened so far, oldest first; all, or those of a name."""
        events = read_events(self.run_dir)
        return [event for event in events if name in (None, event.name)]

    def pids(self, rank: int) -> list[int]:
        """Return the process of each worker that has held a rank, oldest first."""
        seated = [e.fields for e in self.events("seated") if e.fields["rank"] == rank]
        return list(dict.fromkeys(int(fields["pid"]) for fields in seated))

    def pid(self, rank: int) -> int:
        return self.pids(rank)[-1]

    def losses(self) -> dict[tuple[int, int], str]:
        """Return (step, rank) -> loss, bit for bit; a step logged again is the same."""
        losses: dict[tuple[int, int], str] = {}
        for line in lines(self.loss_log):
            step, rank, loss = line.split()
            before = losses.setdefault((int(step), int(rank)), loss)
            assert before == loss, f"logged with another loss: {line}"
        return losses

    def num_repeated(self) -> Counter[int]:
        """Return rank -> how many steps its script has logged again."""
        logged = Counter(tuple(line.split()[:2]) for line in lines(self.loss_log))
        repeated: Counter[int] = Counter()
        for (_, rank), times in logged.items():
            repeated[int(rank)] += times - 1
        return +repeated

    def digests(self) -> dict[int, str]:
        """Return rank -> SHA-256 of its parameters and optimizer at the end."""
        pairs = (line.split() for line in lines(self.final_state))
        return {int(rank): digest for rank, digest in pairs}

    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Return every live process of the job, found by its environment."""
        marker = f"{MARKER}={self._job}".encode()
        return [pid for pid in all_pids() if marker in environment(pid)]

    def check_nothing_is_left(self) -> None:
        """Fail if the ended job left a process, shared memory or a temporary file.

        Sockets need no check of their own: they end with their processes.
        """
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        assert not left, f"processes left: {[command_line(pid) for pid in left]}"
        shared_memory = set(os.listdir("/dev/shm")) - self._shared_memory
        assert not shared_memory, f"shared memory left: {shared_memory}"
        files = [str(path) for path in self._temp.rglob("*")]
        assert not files, f"temporary files left: {files}"


def training(
    folder: Path, *, steps: int, config: str = "ds_config_gpt", **options: Any
) -> LocalCluster:
    """Return the DeepSpeed example as a job that logs where a cluster looks."""
    args = [
        f"--steps={steps}",
        f"--deepspeed_config={CONFIGS / config}.json",
        f"--loss-log={folder / 'losses.txt'}",
        f"--final-state={folder / 'final.txt'}",
    ]
    return LocalCluster(folder=folder, script_args=args, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lines(path: Path) -> list[str]:
    """Return the whole lines of a file that may not exist yet."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(True) if line[-1] == "\n"]


def send_signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, signum)


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def environment(pid: int) -> bytes:
    return _read_proc(pid, "environ")


def command_line(pid: int) -> str:
    return f"{pid} {_read_proc(pid, 'cmdline').replace(bytes(1), b' ').decode()}"


def _read_proc(pid: int, name: str) -> bytes:
    """Return a file of /proc, empty for a process that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
