"""The launcher with a mesh and a manager that do nothing.

The scenarios of test_launch.py are about processes, so their scripts drive this
manager by hand: ``from launch_fakes import manager``.
"""

import logging
import os
import sys
import threading
import types
from typing import Any

manager: Any = None


class Mesh:
    def __init__(self, *, worker_id: int, **_: Any) -> None:
        self.address = f"fake:{worker_id}"

    def close(self) -> None:
        pass


class Manager:
    def __init__(self, *, channel: Any, seat: Any, **_: Any) -> None:
        self.rank = seat.rank
        self.version = 0
        self.is_newcomer = seat.setup_log is not None
        self.epoch = seat.membership.epoch
        self.channel = channel
        self.changed = threading.Condition()
        self.is_finished = False

    def start(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while (message := self.channel.receive()) is not None:
            with self.changed:
                if message["kind"] == "membership":
                    self.epoch = message["membership"]["epoch"]
                self.is_finished |= message["kind"] == "finish"
                self.changed.notify_all()

    def protect(self) -> None:
        if not self.is_newcomer:
            self.channel.send("setup_log", data="bG9n")
        self.channel.send("protected", may_restart=False)

    def tell_modules(self, names: list[str]) -> None:
        self.channel.send("modules", names=names)

    def wait_for_epoch(self, epoch: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.epoch >= epoch, 30)

    def finish(self) -> None:
        self.channel.send("done")
        with self.changed:
            assert self.changed.wait_for(lambda: self.is_finished, 60)

    def close(self) -> None:
        pass


def _install(installed: Manager) -> None:
    global manager
    manager = installed


def _fake(name: str, **names: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    setattr(sys.modules[package], last, module)


def be_nursery() -> None:
    sys.modules["launch_fakes"] = sys.modules[__name__]
    from mnemosyne_plugin import recovery
    from mnemosyne_plugin.launch import nursery

    _fake("mnemosyne_plugin.ccl", Mesh=Mesh)
    seat = types.SimpleNamespace
    _fake("mnemosyne_plugin.recovery.manager", Manager=Manager, Seat=seat)
    vars(recovery)["install"] = _install
    nursery.main()


def launch() -> None:
    """Be ``mnemosyne run``, with this module as nursery."""
    from mnemosyne_plugin import cli

    run = cli._import_launcher()
    logging.basicConfig(level=logging.INFO, format="mnemosyne: %(message)s")
    args = run.get_parser().parse_args(sys.argv[1:])
    exit_code = run.run(args, entry_module=__name__)
    sys.stdout.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    be_nursery()
