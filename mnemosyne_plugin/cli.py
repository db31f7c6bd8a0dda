"""``mnemosyne``: run a job, or report on one."""

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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Only listed here: `run` has torchrun's parser, which imports torch.
    commands.add_parser("run", help="run a script, as torchrun does; see run --help")
    command = commands.add_parser("report", help="print the recoveries of a run")
    command.add_argument("run_dir", metavar="RUN_DIR", type=_run_dir)
    return parser


def _run_dir(path: str) -> str:
    if not os.path.isdir(os.path.join(path, "events")):
        raise argparse.ArgumentTypeError(f"{path} is no run directory")
    return path


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
