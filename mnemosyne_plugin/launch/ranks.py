"""What torchrun gives each rank: its environment variables and its log files."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import TextIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.tail_log import TailLog

from mnemosyne_plugin.errors import ConfigError
from mnemosyne_plugin.launch.board import Board


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpec:
    """What the user asked for that ends up in a rank's environment or logs."""

    run_id: str
    role: str
    max_restarts: int
    virtual_local_rank: bool
    log_line_prefix: str | None
    """Template of what precedes each line that is shown with --tee."""
    stdout_filters: Sequence[str]
    stderr_filters: Sequence[str]


def environments(
    spec: RankSpec, board: Board, attempt: int
) -> dict[int, dict[str, str]]:
    """Return the environment of each local rank of this agent, as torchrun has it."""
    infos, agent = board.infos, board.agent
    num_local = infos[agent].num_ranks
    same_role = [info if info.role == spec.role else None for info in infos]
    role_base = sum(info.num_ranks for info in same_role[:agent] if info)
    common = {
        "GROUP_RANK": agent,
        "GROUP_WORLD_SIZE": board.num_agents,
        "ROLE_NAME": spec.role,
        "ROLE_WORLD_SIZE": sum(info.num_ranks for info in same_role if info),
        "LOCAL_WORLD_SIZE": num_local,
        "WORLD_SIZE": sum(info.num_ranks for info in infos),
        "MASTER_ADDR": board.host,
        "MASTER_PORT": board.worker_port(attempt),
        "TORCHELASTIC_RESTART_COUNT": attempt,
        "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
        "TORCHELASTIC_RUN_ID": spec.run_id,
        # Always: the leader hosts it, since any worker may be killed.
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.getenv(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"
        ),
    }
    return {
        local: {
            name: str(value)
            for name, value in {
                **common,
                "RANK": board.first_rank + local,
                "ROLE_RANK": role_base + local,
                "LOCAL_RANK": local,
                **(_virtual(local) if spec.virtual_local_rank else {}),
            }.items()
        }
        for local in range(num_local)
    }


def _virtual(local_rank: int) -> dict[str, str]:
    """Show each rank one device only, its own, as device 0."""
    visible = os.getenv("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else None
    if devices is not None and local_rank >= len(devices):
        raise ConfigError(
            f"--virtual-local-rank: local rank {local_rank} has no device in "
            f"CUDA_VISIBLE_DEVICES={visible}"
        )
    device = devices[local_rank].strip() if devices else str(local_rank)
    return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device}


class RankLogs:
    """The log files of one attempt's ranks, and what is shown of them.

    Construction adds TORCHELASTIC_ERROR_FILE to the environments.
    """

    def __init__(
        self, spec: RankSpec, specs: LogsSpecs, envs: dict[int, dict[str, str]]
    ) -> None:
        self._dest: LogsDest = specs.reify(envs)
        self._files: list[TextIO] = []
        prefixes = None
        if spec.log_line_prefix:
            template = Template(spec.log_line_prefix)
            prefixes = {
                local: template.safe_substitute(
                    role_name=spec.role, rank=env["RANK"], local_rank=local
                )
                for local, env in envs.items()
            }
        self._tails: list[TailLog] = []
        for paths, stream, needles, filtered in (
            (
                self._dest.tee_stdouts,
                sys.stdout,
                spec.stdout_filters,
                self._dest.filtered_stdout,
            ),
            (
                self._dest.tee_stderrs,
                sys.stderr,
                spec.stderr_filters,
                self._dest.filtered_stderr,
            ),
        ):
            self._tails.append(TailLog(spec.role, paths, stream, prefixes))
            if needles:
                self._tails.append(
                    self._filtered(spec.role, paths, filtered, prefixes, list(needles))
                )
        for tail in self._tails:
            tail.start()

    def _filtered(
        self,
        role: str,
        paths: dict[int, str],
        target: str,
        prefixes: dict[int, str] | None,
        needles: list[str],
    ) -> TailLog:
        file = open(target, "w", errors="replace", buffering=1)  # noqa: SIM115
        self._files.append(file)
        return TailLog(
            role,
            paths,
            file,
            prefixes,
            log_line_filter=lambda line: any(needle in line for needle in needles),
        )

    def paths(self, local_rank: int) -> dict[str, str]:
        """Return where a rank writes; an empty path is the agent's own stream."""
        return {
            "stdout": self._dest.stdouts[local_rank],
            "stderr": self._dest.stderrs[local_rank],
        }

    def is_stderr_shown(self, local_rank: int) -> bool:
        """Whether the user sees this rank's stderr."""
        hidden = self._dest.stderrs[local_rank]
        return not hidden or local_rank in self._dest.tee_stderrs

    def close(self) -> None:
        """Show the rest of the logs, and end the threads that follow them."""
        for tail in self._tails:
            tail.stop()
        for file in self._files:
            file.close()
