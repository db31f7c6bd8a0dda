"""A worker: waits for a seat, then runs the user's script on it."""

import base64
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mnemosyne_plugin.errors import FatalError, NoSourceForState, PeerLost
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.recovery.channel import Channel
from mnemosyne_plugin.recovery.membership import Membership

logger = logging.getLogger(__name__)


def import_runtime() -> None:
    """Import what every worker needs; the nursery does it once for all."""
    import torch.distributed.elastic.multiprocessing.errors  # noqa: F401

    import mnemosyne_plugin.ccl
    import mnemosyne_plugin.recovery.manager  # noqa: F401


def main(
    order: dict[str, Any],
    channel: Channel,
    on_phase: Callable[[int, str, int], None] | None = None,
) -> int:
    """Be the worker that ``order`` describes; return its exit code."""
    os.setsid()
    from mnemosyne_plugin import proxy, recovery
    from mnemosyne_plugin.ccl import Mesh
    from mnemosyne_plugin.recovery.manager import Manager, Seat

    worker_id = order["worker_id"]
    mesh = Mesh(
        worker_id=worker_id,
        secret=bytes.fromhex(order["secret"]),
        bind_host=order["bind_host"],
        transport=order["transport"],
    )
    seat = _wait_for_seat(channel, worker_id, mesh.address)
    if seat is None:  # the job ends without us
        mesh.close()
        return 0
    _take_seat(order, seat)
    log = seat["setup_log"]
    place = Seat(
        rank=seat["rank"],
        membership=Membership.from_json(seat["membership"]),
        setup_log=None if log is None else base64.b64decode(log),
    )
    events = EventLog(order["run_dir"], f"worker-{worker_id}", worker_id=worker_id)
    manager: Manager | None = None
    try:
        manager = Manager(
            mesh=mesh,
            channel=channel,
            seat=place,
            events=events,
            on_phase=on_phase,
            proxy=proxy.loaded(),
        )
        recovery.install(manager)
        manager.start()
        _run_script(order)
        manager.finish()
    except BaseException as error:
        _fail(error, channel, manager.version if manager else 0)
    else:
        manager.close()
    mesh.close()
    return 0


def _wait_for_seat(
    channel: Channel, worker_id: int, address: str
) -> dict[str, Any] | None:
    try:
        channel.send("ready", worker_id=worker_id, pid=os.getpid(), address=address)
    except PeerLost:
        return None
    message = channel.receive()
    return message if message is not None and message["kind"] == "seat" else None


def _take_seat(order: dict[str, Any], seat: dict[str, Any]) -> None:
    """Make this process look as if python had been started for this rank."""
    from torch.distributed.elastic.utils.api import macros

    for fd, path in ((1, seat["logs"]["stdout"]), (2, seat["logs"]["stderr"])):
        if path:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            log = os.open(path, flags, 0o644)
            os.dup2(log, fd)
            os.close(log)
    os.environ.update(seat["env"])
    args = macros.substitute(order["args"], seat["env"]["LOCAL_RANK"])
    sys.argv = [order["script"], *args]
    # As python does: the script's folder comes first, for a module the current one.
    if not getattr(sys.flags, "safe_path", False):
        folder = os.path.dirname(os.path.realpath(order["script"]))
        sys.path.insert(0, os.getcwd() if order["is_module"] else folder)


def _run_script(order: dict[str, Any]) -> None:
    """Run the user's script; a SystemExit that means success is swallowed."""
    try:
        if order["is_module"]:
            runpy.run_module(order["script"], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(order["script"], run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise


def _fail(error: BaseException, channel: Channel, step: int) -> None:
    """Report the error as python would, tell the agent, and end.

    The process ends without a farewell to its peers: they learn at once that this
    rank is lost, instead of waiting for what it will never send. Nor does it wait for
    its device, which may be broken: no destructor runs.
    """
    from mnemosyne_plugin.recovery import device_errors

    found = device_errors.find(error)
    if isinstance(error, SystemExit):
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code & 0xFF if isinstance(error.code, int) else 1
        text = f"exit code {code}"
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        error.__traceback__ = _without_launcher(error.__traceback__)
        text = "".join(traceback.format_exception(error))
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        try:
            get_error_handler().record_exception(error)
        except OSError as problem:
            logger.warning("cannot write the error file: %s", problem)
    try:
        channel.send(
            "failed",
            traceback=text,
            fatal=isinstance(error, FatalError),
            is_state_lost=isinstance(error, NoSourceForState),
            step=step,
            cure=found.cure if found else "",
            device_error=f"{device_errors.name_device()}: {found.text}"
            if found
            else "",
        )
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code or 1)


def _without_launcher(trace: TracebackType | None) -> TracebackType | None:
    """Skip the frames between this module and the user's script."""
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None:
        if trace.tb_frame.f_code.co_filename not in ours:
            return trace
        trace = trace.tb_next
    return None
