"""``mnemosyne``: run a job, report on one, or look whether one would be protected."""

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from mnemosyne_plugin import __version__, report
from mnemosyne_plugin.errors import ConfigError, MnemosyneError

_CHAOS = "mnemosyne_plugin.chaos"

EXIT_UNPROTECTED = 1
EXIT_USAGE = 2
EXIT_FATAL = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("mnemosyne_plugin").addHandler(_console())
    logging.getLogger("mnemosyne_plugin").setLevel(logging.INFO)
    try:
        if words[:1] == ["run"]:
            _run(words[1:])
        args = _parser().parse_args(words)
        if args.command == "doctor":
            return _examine(args)
        print(report.table(report.recoveries(args.run_dir)) or "no recoveries")
        return 0
    except ConfigError as error:
        print(f"mnemosyne: {error}", file=sys.stderr)
        return EXIT_USAGE
    except MnemosyneError as error:
        print(f"mnemosyne: {error}", file=sys.stderr)
        return EXIT_FATAL


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mnemosyne", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    # Only listed here: `run` has torchrun's parser, which imports torch.
    commands.add_parser("run", help="run a script, as torchrun does; see run --help")
    command = commands.add_parser("report", help="print the recoveries of a run")
    command.add_argument("run_dir", metavar="RUN_DIR", type=_run_dir)
    what = "tell what is here, what a job would use, and what would not survive"
    command = commands.add_parser("doctor", help=what, description=what)
    command.add_argument(
        "--device-proxy",
        "--device_proxy",
        action="store_true",
        help="judge as for `mnemosyne run --device-proxy`",
    )
    command.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="the longest wait for each of torch, the driver and the device proxy",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run_dir(path: str) -> str:
    if not os.path.isdir(os.path.join(path, "events")):
        raise argparse.ArgumentTypeError(f"{path} is no run directory")
    return path


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def _examine(args: argparse.Namespace) -> int:
    from mnemosyne_plugin import doctor

    findings = doctor.examine(args.device_proxy, args.timeout)
    if args.json:
        print(json.dumps(doctor.data(findings), indent=2))
    else:
        print(doctor.text(findings))
    return 0 if doctor.is_protected(findings) else EXIT_UNPROTECTED


def _run(words: Sequence[str]) -> NoReturn:
    run = _import_launcher()
    parser = run.get_parser()
    parser.add_argument(
        "--chaos",
        action="append",
        default=[],
        metavar="SPEC",
        help="Inject a fault, for tests: 'kill rank=2 step=12 phase=backward'.",
    )
    args = parser.parse_args(words)
    if not args.chaos:
        _leave(run.run(args))
    from mnemosyne_plugin import chaos

    for spec in args.chaos:
        chaos.parse(spec)
    os.environ["MNEMOSYNE_CHAOS"] = json.dumps(args.chaos)
    _leave(run.run(args, entry_module=_CHAOS))


def _import_launcher() -> ModuleType:
    """Import the launcher, with torch's C++ quiet in this process only.

    It would report the end of a store, which we do ourselves, with a stack of frames.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    is_set = name in os.environ
    os.environ.setdefault(name, "ERROR")
    gc.disable()  # all of it stays
    from mnemosyne_plugin.launch import run

    gc.freeze()
    gc.enable()
    if not is_set:
        del os.environ[name]
    return run


def _leave(exit_code: int) -> NoReturn:
    """End this process without Python's clean-up.

    It would end threads that still wait in the store, which C++ takes for a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _console() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mnemosyne: %(message)s"))
    return handler


if __name__ == "__main__":
    sys.exit(main())
