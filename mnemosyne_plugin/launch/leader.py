"""The leader: feeds the evidence of all agents to the rule."""

import logging
import time
from collections.abc import Callable
from typing import Any

from mnemosyne_plugin.launch.board import Board
from mnemosyne_plugin.recovery.membership import (
    AgentLost,
    Decision,
    Evidence,
    GraceOver,
    Restart,
    apply,
    new_job,
)

logger = logging.getLogger(__name__)

GRACE_S = 0.25
"""From a lost link to a new epoch without an exit. A dying worker closes its links
before its agent is told, by 10 ms or so."""

BEAT_S = 2.0
SILENCE_S = 20.0
"""An agent without a beat for so long is lost: ten beats, so that a busy machine is not
taken for a dead one."""


class Leader:
    """Runs in the agent of group rank 0, on its event loop."""

    def __init__(
        self,
        board: Board,
        max_restarts: int | None,
        later: Callable[[float, Callable[[], None]], Any],
        publish: Callable[[Decision], None],
    ) -> None:
        self._board = board
        self._job = new_job(tuple(info.num_ranks for info in board.infos), max_restarts)
        self._later = later
        self._publish = publish
        self.lost_agents: set[int] = set()
        self._beats: dict[int, tuple[int, float]] = {}
        if board.num_agents > 1:
            later(BEAT_S, self._check_beats)

    def hear(self, evidence: Evidence) -> None:
        """Publish what follows from the evidence."""
        was_suspected = self._job.suspected
        self._job, decisions, reason = apply(self._job, evidence)
        logger.debug("epoch=%d %s: %s", self._job.epoch, evidence, reason)
        for decision in decisions:
            logger.info("epoch=%d %s", self._job.epoch, reason)
            if isinstance(decision, Restart):
                self._board.host_worker_store(decision.attempt)
            self._publish(decision)
        if self._job.suspected and not was_suspected:
            over = GraceOver(epoch=self._job.epoch)
            self._later(GRACE_S, lambda: self.hear(over))

    def _check_beats(self) -> None:
        now = time.monotonic()
        for agent, beat in enumerate(self._board.beats()):
            if self._beats.get(agent, (-1, now))[0] != beat:
                self._beats[agent] = beat, now
            elif now - self._beats[agent][1] > SILENCE_S:
                self.lost_agents.add(agent)
                silent = f"not heard of for {SILENCE_S} s"
                self.hear(AgentLost(agent=agent, reason=silent))
        if self._job.finish is None:
            self._later(BEAT_S, self._check_beats)
