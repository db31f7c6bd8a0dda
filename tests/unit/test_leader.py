"""The leader's timers: the grace period after a lost link, and agents gone silent."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mnemosyne_plugin.launch import leader as leader_module
from mnemosyne_plugin.launch.leader import GRACE_S, SILENCE_S, Leader
from mnemosyne_plugin.recovery.membership import (
    Decision,
    Exited,
    Finish,
    LinkLost,
    Membership,
    Protected,
    Ready,
    SetupLogged,
)


class Clock:
    """Time that passes only when a test says so, and the calls that are due."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.calls.append((self.now_s + delay_s, call))

    def pass_by(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while due := [call for call in self.calls if call[0] <= end_s]:
            first = min(due, key=lambda call: call[0])
            self.calls.remove(first)
            self.now_s = first[0]
            first[1]()
        self.now_s = end_s


class Scene:
    """A leader of agents with one rank each, all of them in training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_agents: int) -> None:
        self.clock = Clock()
        clock = SimpleNamespace(monotonic=lambda: self.clock.now_s)
        monkeypatch.setattr(leader_module, "time", clock)
        self.beats = [0] * num_agents
        self.decisions: list[Decision] = []
        board = SimpleNamespace(
            infos=[SimpleNamespace(num_ranks=1)] * num_agents,
            num_agents=num_agents,
            beats=lambda: list(self.beats),
        )
        self.leader = Leader(
            board,  # type: ignore[arg-type]
            None,
            self.clock.later,
            self.decisions.append,
        )
        for agent in range(num_agents):
            ready = Ready(attempt=0, agent=agent, worker_id=agent, address="")
            self.leader.hear(ready)
        for rank in range(num_agents):
            self.leader.hear(SetupLogged(attempt=0, rank=rank))
            self.leader.hear(Protected(attempt=0, rank=rank))

    def epochs(self) -> list[int]:
        return [d.epoch for d in self.decisions if isinstance(d, Membership)]


LOST = LinkLost(attempt=0, rank=0, lost_rank=1, epoch=1)


def test_a_lost_link_waits_for_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2)
    scene.leader.hear(LOST)
    scene.clock.pass_by(GRACE_S / 2)
    scene.leader.hear(Exited(attempt=0, agent=1, worker_id=1, exit_code=-9))
    scene.beats = [1, 1]
    scene.clock.pass_by(1)
    assert scene.epochs() == [1]  # a worker must come before the next one
    scene.leader.hear(Ready(attempt=0, agent=1, worker_id=7, address=""))
    assert scene.epochs() == [1, 2]


def test_a_lost_link_without_a_cause_is_a_new_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, 2)
    scene.leader.hear(LOST)
    scene.leader.hear(LinkLost(attempt=0, rank=1, lost_rank=0, epoch=1))
    assert scene.epochs() == [1]
    scene.clock.pass_by(GRACE_S)
    assert scene.epochs() == [1, 2]


def test_an_agent_that_is_silent_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2)
    for _ in range(30):  # agent 1 says nothing from the start
        scene.beats[0] += 1
        scene.clock.pass_by(1)
    finish = scene.decisions[-1]
    assert isinstance(finish, Finish) and finish.exit_code == 3
    assert scene.leader.lost_agents == {1}
    assert SILENCE_S < 30


def test_agents_that_beat_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 2)
    for _ in range(100):
        scene.beats = [beat + 1 for beat in scene.beats]
        scene.clock.pass_by(5)
    assert scene.epochs() == [1] and len(scene.decisions) == 1
