"""``mnemosyne run``: torchrun's command line, and a few options of our own."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import uuid
from contextlib import suppress

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from mnemosyne_plugin import proxy, report
from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.launch.agent import Agent, AgentSpec
from mnemosyne_plugin.launch.ranks import RankLogs, RankSpec
from mnemosyne_plugin.launch.script_config import device_proxy_choice
from mnemosyne_plugin.launch.workforce import Worker

SHUTDOWN_TIMEOUT_S = 5
"""Between SIGTERM and SIGKILL. Shorter than torchrun's 30: workers whose peers are
gone wait in collectives, and do not end by themselves."""

NURSERY = "mnemosyne_plugin.launch.nursery"


def get_parser() -> argparse.ArgumentParser:
    """Return torchrun's parser with our options added."""
    parser = torchrun.get_args_parser()
    parser.prog = "mnemosyne run"
    # Else an argument of the script that begins as one of ours does is an error.
    parser.allow_abbrev = False
    parser.description = "Run a training script that survives the loss of workers"
    if "PET_MAX_RESTARTS" not in os.environ:
        # None: no limit for what we recover from without a restart.
        parser.set_defaults(max_restarts=None)
    ours = parser.add_argument_group("mnemosyne")
    ours.add_argument(
        "--standby",
        type=int,
        default=0,
        metavar="N",
        help="Warm spare workers on each node.",
    )
    ours.add_argument(
        "--preload",
        action="append",
        default=[],
        metavar="MODULE",
        help="Import it once per node, in front of the script, for all its workers.",
    )
    ours.add_argument(
        "--run-dir",
        "--run_dir",
        metavar="DIR",
        help="Where to keep events and logs; by default they end with the run.",
    )
    ours.add_argument(
        "--transport",
        choices=["auto", "tcp"],
        default="auto",
        help="Links between workers: shared memory within a node, or always TCP.",
    )
    ours.add_argument(
        "--device-proxy",
        "--device_proxy",
        action="store_true",
        help="Keep each GPU in a process of its own, so that its loss ends no worker.",
    )
    ours.add_argument(
        "--device-timeout",
        "--device_timeout",
        type=float,
        default=None,
        metavar="SECONDS",
        help="With --device-proxy: how long a GPU may take until it counts as hung; "
        f"{proxy.TIMEOUT_S:.0f} by default.",
    )
    with suppress(argparse.ArgumentError):  # torch has it since 2.13
        ours.add_argument(
            "--shutdown-timeout", "--shutdown_timeout", type=int, default=None
        )
    return parser


def run(args: argparse.Namespace, entry_module: str = NURSERY) -> int:
    """Run the job's part on this node; return the exit code."""
    _check(args)
    is_temporary = args.run_dir is None
    run_dir = tempfile.mkdtemp(prefix="mnemosyne_") if is_temporary else args.run_dir
    try:
        os.makedirs(run_dir, exist_ok=True)
        if args.log_dir is None and not (is_temporary and _keeps_logs(args)):
            args.log_dir = os.path.join(run_dir, "logs")
        config = _torch_config(args)
        spec = _agent_spec(args, config, run_dir, entry_module)
        parameters = RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs,
        )
        agent = Agent(spec, get_rendezvous_handler(parameters))
        exit_code = agent.run()
        _print_end(agent)
        _print_report(agent, run_dir)
        return exit_code
    finally:
        if is_temporary:
            shutil.rmtree(run_dir, ignore_errors=True)


def _check(args: argparse.Namespace) -> None:
    if args.no_python:
        raise ConfigError("--no-python: workers are forked from a warm python; drop it")
    if args.numa_binding is not None:
        raise ConfigError("--numa-binding is not supported yet; use numactl outside")
    if args.standby < 0:
        raise ConfigError(f"--standby must be 0 or more, got {args.standby}")
    if args.max_restarts is not None and args.max_restarts < 0:
        raise ConfigError(f"--max-restarts must be 0 or more, got {args.max_restarts}")
    if args.device_timeout is not None and not args.device_timeout > 0:
        raise ConfigError(
            f"--device-timeout must be more than 0, got {args.device_timeout}"
        )
    if not args.module and not os.path.exists(args.training_script):
        raise ConfigError(f"no such script: {args.training_script}")
    choice = device_proxy_choice(args.training_script_args)
    if choice is not None and choice.enabled:
        args.device_proxy = True
    elif choice is not None and args.device_proxy:
        raise ConfigError(
            "--device-proxy is given, but mnemosyne.device_proxy.enabled is false in "
            "the ds_config that the script's arguments name; leave one out"
        )


def _keeps_logs(args: argparse.Namespace) -> bool:
    """Whether the user asked for log files, which then outlive the run."""
    return str(args.redirects) != "0" or str(args.tee) != "0"


def _torch_config(args: argparse.Namespace) -> LaunchConfig:
    """Read the arguments as torchrun does."""
    one_node = args.rdzv_backend == "static" and not args.rdzv_endpoint
    one_node = one_node and args.master_port is None
    try:
        if args.standalone or (
            one_node and torchrun.parse_min_max_nnodes(args.nnodes)[1] == 1
        ):
            args.rdzv_backend = "c10d"
            args.rdzv_endpoint = "localhost:0"
            args.rdzv_id = str(uuid.uuid4())
        if args.master_port is None:
            args.master_port = 29500
        ours = argparse.Namespace(**vars(args))
        ours.max_restarts = args.max_restarts or 0
        return torchrun.config_from_args(ours)[0]
    except (ValueError, RuntimeError, AssertionError, NotADirectoryError) as error:
        raise ConfigError(str(error)) from error


def _agent_spec(
    args: argparse.Namespace, config: LaunchConfig, run_dir: str, entry_module: str
) -> AgentSpec:
    assert config.logs_specs is not None
    names = [name.strip() for name in config.signals_to_handle.split(",")]
    unknown = [name for name in names if name not in signal.Signals.__members__]
    if unknown:
        raise ConfigError(f"--signals-to-handle: no signal {', '.join(unknown)}")
    timeout_s = args.shutdown_timeout
    if timeout_s is None:
        timeout_s = os.getenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)
    ranks = RankSpec(
        run_id=config.run_id,
        role=config.role,
        max_restarts=config.max_restarts,
        virtual_local_rank=config.virtual_local_rank,
        log_line_prefix=config.log_line_prefix_template,
        stdout_filters=tuple(config.duplicate_stdout_filters or ()),
        stderr_filters=tuple(config.duplicate_stderr_filters or ()),
    )
    return AgentSpec(
        num_ranks=config.nproc_per_node,
        num_standbys=args.standby,
        preload=tuple(args.preload),
        max_restarts=args.max_restarts,
        script=args.training_script,
        args=tuple(args.training_script_args),
        is_module=bool(args.module),
        transport=args.transport,
        run_dir=os.path.abspath(run_dir),
        local_addr=config.local_addr,
        shutdown_timeout_s=float(timeout_s),
        entry_module=entry_module,
        signals=tuple(signal.Signals[name] for name in names),
        environment=(
            proxy.preload(os.environ, args.device_timeout) if args.device_proxy else {}
        ),
        logs=config.logs_specs,
        ranks=ranks,
    )


def _print_end(agent: Agent) -> None:
    """Say why the job failed, on the node where it did; elsewhere in one line."""
    finish = agent.finish
    if finish is None or finish.exit_code == 0:
        return
    what = "failed" if finish.exit_code < 128 else "ended"
    lines = [f"mnemosyne: the job {what}: {finish.reason}"]
    worker = agent.failed.get(finish.worker_id)
    if worker is not None and agent.board is not None and agent.logs is not None:
        lines += _describe(worker, worker.rank - agent.board.first_rank, agent.logs)
    if finish.exit_code < 128 and agent.checkpoint:
        lines.append(f"  checkpoint: {agent.checkpoint}, the newest of this run")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _describe(worker: Worker, local_rank: int, logs: RankLogs) -> list[str]:
    """Return lines that say how the worker of a rank ended, as torchrun does."""
    how = f"{worker.exit_code} (pid: {worker.pid})"
    if worker.exit_code < 0:
        how += f" ({signal.Signals(-worker.exit_code).name})"
    lines = [
        f"  rank      : {worker.rank} (local_rank: {local_rank})",
        f"  exitcode  : {how}",
    ]
    log = logs.paths(local_rank)["stderr"]
    if log:
        lines.append(f"  log       : {log}")
    if worker.traceback and not logs.is_stderr_shown(local_rank):
        lines.append(worker.traceback.rstrip())
    return lines


def _print_report(agent: Agent, run_dir: str) -> None:
    """Print the recoveries, once per run directory."""
    board = agent.board
    if board is None or not board.infos:
        return
    own = board.infos[board.agent].run_dir
    if own in [info.run_dir for info in board.infos[: board.agent]]:
        return
    table = report.table(report.recoveries(run_dir))
    if table:
        print(table, file=sys.stderr, flush=True)
