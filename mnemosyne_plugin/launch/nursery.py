"""The nursery: a process that has imported everything and forks workers.

It stays single-threaded, because only then is a fork safe, and never touches an
accelerator. Each worker is forked twice, so that it becomes a child of the agent,
which sees its exit code or signal exactly. ``main`` runs in the nursery and, after
a fork, in the worker; ``Nursery`` is the agent's handle of it.
"""

import functools
import gc
import importlib
import importlib.util
import os
import random
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mnemosyne_plugin import proxy
from mnemosyne_plugin.errors import PeerLost
from mnemosyne_plugin.launch.prctl import die_with_parent
from mnemosyne_plugin.recovery.channel import Channel

_NEVER_PRELOAD = ("__main__", "torch._inductor.async_compile")
"""Started already, or known to start threads when imported."""

OnPhase = Callable[[int, str, int], None]

_FD, _AGENT = "MNEMOSYNE_NURSERY_FD", "MNEMOSYNE_AGENT_PID"


class Nursery:
    """The agent's handle of a nursery process.

    Starts it at construction; it becomes warm when it has imported torch, what the
    user ``wanted``, which must be there, and what it can of ``modules``, and says so
    with the message ``warm`` on ``channel``. Its answers to ``fork`` are ``forked``
    messages. Must be made by the agent's main thread, since
    the nursery dies with the thread that made it. With a ``parent`` it is a fork of
    that one, which has imported most already; its pid is 0 until it is warm.
    """

    def __init__(
        self,
        entry_module: str,
        run_dir: str,
        wanted: Sequence[str] = (),
        modules: Sequence[str] = (),
        parent: "Nursery | None" = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.channel, theirs = Channel.pair()
        self.modules = tuple(modules)
        self.is_warm = False
        self.pid = 0
        try:
            if parent is not None:
                parent.channel.send("branch", fds=[theirs.fileno()])
            else:
                self.pid = self._start(entry_module, run_dir, theirs, environment)
        finally:
            theirs.close()
        self.channel.send("warm_up", wanted=wanted, modules=self.modules)

    @staticmethod
    def _start(
        entry_module: str,
        run_dir: str,
        channel: Channel,
        environment: Mapping[str, str],
    ) -> int:
        """Start the process at the other end of the channel; return its pid."""
        env = (
            os.environ
            | environment
            | {
                "MNEMOSYNE_WORKER": "1",
                "MNEMOSYNE_RUN_DIR": run_dir,
                _FD: str(channel.fileno()),
                _AGENT: str(os.getpid()),
            }
        )
        # Without the current folder on the path: whatever lies there is for the script.
        start = f"""
import runpy, sys
if not getattr(sys.flags, "safe_path", False):
    sys.path.pop(0)
runpy.run_module({entry_module!r}, run_name="__main__", alter_sys=True)
"""
        command = [sys.executable, "-u", "-c", start]
        process = subprocess.Popen(
            command, env=env, pass_fds=[channel.fileno()], start_new_session=True
        )
        # The agent reaps all its children itself; without this, Popen complains.
        process.returncode = 0
        return process.pid

    def fork(self, order: dict[str, Any]) -> Channel:
        """Ask for a worker; return the channel to it."""
        ours, theirs = Channel.pair()
        try:
            self.channel.send("fork", order=order, fds=[theirs.fileno()])
        finally:
            theirs.close()
        return ours

    def close(self) -> None:
        """Have the nursery end; its workers stay."""
        self.channel.close()


def main(on_phase: OnPhase | None = None) -> None:
    """Serve forks until the agent closes the channel; end as worker, if forked.

    on_phase: for the manager of each worker.
    """
    # What is imported stays: looking for garbage in it takes a quarter of the import.
    gc.disable()
    agent_pid = int(os.environ.pop(_AGENT))
    die_with_parent(agent_pid)
    channel: Channel | None = Channel(int(os.environ.pop(_FD)))
    from mnemosyne_plugin.launch import worker

    worker.import_runtime()
    own_count = _count_devices_forkably()
    while channel is not None:
        channel = _serve(channel, agent_pid, on_phase, own_count)


def _count_devices_forkably() -> Callable[[], None]:
    """Have torch count devices, as DeepSpeed does when imported, and stay forkable.

    With the device proxy torch's own count would start a server, with a thread that
    waits for it, and it forbids CUDA in all forks. Returns what brings it back.
    """
    c, device = sys.modules["torch"]._C, proxy.loaded()
    own = getattr(c, "_cuda_getDeviceCount", None)  # not in a torch for the CPU
    if device is None or own is None:
        return lambda: None
    c._cuda_getDeviceCount = functools.cache(device.count_devices)
    return functools.partial(setattr, c, "_cuda_getDeviceCount", own)


def _serve(
    channel: Channel,
    agent_pid: int,
    on_phase: OnPhase | None,
    own_count: Callable[[], None],
) -> Channel | None:
    """Warm up, then fork until the agent closes the channel.

    Returns in a fork too, if that is to be a nursery: the channel that it is to serve.
    """
    request = channel.receive()
    if request is None:
        return None
    for name in request["wanted"]:
        importlib.import_module(name)
    if not is_safe_to_fork():
        names = ", ".join(["torch", *request["wanted"]])
        raise RuntimeError(f"importing {names} started a thread: no worker can fork")
    culprit = preload(request["modules"])
    # Nor do workers look at it ever again: each would copy the pages by that.
    gc.freeze()
    try:
        channel.send("warm", culprit=culprit, pid=os.getpid())
    except PeerLost:
        return None  # the job was over before
    while (request := channel.receive()) is not None:
        fd, pid = channel.take_fd(), _fork(agent_pid)
        if pid == 0:
            channel.close()
            if request["kind"] == "branch":
                os.setsid()
                return Channel(fd)
            gc.enable()
            own_count()
            _reseed()
            from mnemosyne_plugin.launch import worker

            sys.exit(worker.main(request["order"], Channel(fd), on_phase))
        os.close(fd)
        if request["kind"] == "fork":
            try:
                worker_id = request["order"]["worker_id"]
                channel.send("forked", worker_id=worker_id, pid=pid)
            except PeerLost:
                return None
    return None


def _fork(agent_pid: int) -> int:
    """Fork a process whose parent is the agent; return its pid, and 0 in it."""
    if sys.modules["torch"].cuda.is_initialized():
        raise RuntimeError("the nursery cannot fork: it uses a device")
    pid_in, pid_out = os.pipe()
    gate_in, gate_out = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid = os.fork()
        if pid:
            os.write(pid_out, str(pid).encode())
            os._exit(0)
        os.close(pid_in)
        os.close(pid_out)
        os.close(gate_out)
        # The gate opens when the process in the middle is gone for good, so that
        # the agent is our parent.
        os.read(gate_in, 1)
        os.close(gate_in)
        die_with_parent(agent_pid)
        return 0
    os.close(pid_out)
    os.close(gate_in)
    pid = int(os.read(pid_in, 32))
    os.close(pid_in)
    os.waitpid(middle, 0)
    os.close(gate_out)
    return pid


def _reseed() -> None:
    """Give this worker its own random numbers, as a process that was started has."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def preload(modules: Iterable[str]) -> str | None:
    """Import what may be; return the name of a module that started a thread, or None.

    A module of the user's own may read the environment of its rank when imported, so
    only those of the standard library and of site-packages are. What an import
    prints is for the worker to show, when it imports in earnest.
    """
    homes = _library_folders()
    saved = [os.dup(fd) for fd in (1, 2)]
    quiet = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in (1, 2):
            os.dup2(quiet, fd)
        for name in modules:
            if name in sys.modules or not _may_preload(name, homes):
                continue
            try:
                importlib.import_module(name)
            except (Exception, SystemExit):
                # The worker that imported it had set something up before. Whoever
                # needs it will import it again and see the error, if there is one.
                continue
            if not is_safe_to_fork():
                return name
        return None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)
        os.close(quiet)


def _may_preload(name: str, homes: Sequence[Path]) -> bool:
    if any(name == never or name.startswith(f"{never}.") for never in _NEVER_PRELOAD):
        return False
    top, *rest = name.split(".")
    if top in (*sys.builtin_module_names, "mnemosyne_plugin"):
        return True
    try:
        spec = importlib.util.find_spec(top)
        # A namespace may be spread over folders, also over a user's own: what is in it
        # counts. Looking for that imports nothing.
        while spec is not None and spec.origin is None and rest:
            top = f"{top}.{rest.pop(0)}"
            spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    places = (
        [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    )
    return bool(places) and all(
        any(home in Path(place).resolve().parents for home in homes) for place in places
    )


def _library_folders() -> list[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in names]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return [Path(folder).resolve() for folder in folders]


def is_safe_to_fork() -> bool:
    """Whether no thread of this process could hold a lock in a forked worker.

    OpenBLAS, which numpy brings, has threads from the start, and ends them in front of
    a fork; they come back when they are needed. So the threads that count are those
    which survive a fork.
    """
    if _num_threads() > 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return _num_threads() == 1


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    main()
