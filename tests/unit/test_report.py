"""The table of recoveries, from events as processes write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mnemosyne_plugin import cli, report
from mnemosyne_plugin.events import Event, EventLog


class Story:
    """Events of a run with ranks 0 to 2, in milliseconds."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.membership(0, epoch=1, seated=(0, 1, 2), newcomer=False)

    def at(self, time_ms: float, name: str, **fields: Any) -> None:
        event = Event(name=name, time_s=1000 + time_ms / 1000, fields=fields)
        self.events.append(event)

    def membership(
        self, time_ms: float, epoch: int, seated: Sequence[int], newcomer: bool = True
    ) -> None:
        self.at(time_ms, "membership", epoch=epoch, members=[])
        for rank in seated:
            self.at(time_ms, "seated", rank=rank, epoch=epoch, newcomer=newcomer)

    def death(self, time_ms: float, rank: int) -> None:
        self.at(time_ms, "worker_exited", rank=rank, exit_code=-9, signal=9)

    def steps(
        self, time_ms: float, epoch: int, ranks: Sequence[int] = (0, 1, 2)
    ) -> None:
        for rank in ranks:
            self.at(time_ms + rank, "first_step", epoch=epoch, rank=rank, step=4)

    def rows(self) -> list[report.Recovery]:
        self.events.sort(key=lambda event: event.time_s)
        return report.from_events(self.events)


def full_recovery() -> Story:
    story = Story()
    story.at(100, "fault", rank=1, step=4, phase="backward")
    story.at(101, "link_lost", rank=0, lost_rank=1, epoch=1)
    story.death(102, rank=1)
    story.membership(105, epoch=2, seated=[1])
    story.at(107, "reconfigured", epoch=2, rank=0, links_replaced=1)
    story.at(108, "reconfigured", epoch=2, rank=2, links_replaced=1)
    story.at(150, "setup_done", epoch=2, rank=1)
    story.at(160, "state_received", epoch=2, rank=1, bytes=2_000_000, seconds=0.004)
    for rank in (0, 2):
        story.at(165, "redo", epoch=2, rank=rank, step=4)
    story.steps(200, epoch=2)
    return story


def test_a_run_without_a_failure_has_no_table() -> None:
    story = Story()
    story.at(9, "worker_exited", rank=None, exit_code=-9, signal=9)  # a standby
    story.at(10, "worker_exited", rank=0, exit_code=0, signal=None)
    assert story.rows() == []
    assert report.table([]) == ""


def test_every_phase_of_a_recovery_is_told() -> None:
    (row,) = full_recovery().rows()
    ms = {
        name: round((getattr(row, name) - 1000) * 1000)
        for name in report.Recovery.__slots__
        if name.endswith("_s") and name != "state_duration_s"
    }
    assert ms == {
        "fault_s": 100,
        "detected_s": 101,
        "agreed_s": 105,
        "links_s": 108,
        "setup_done_s": 150,
        "state_s": 160,
        "first_step_s": 202,
    }
    assert (row.epoch, row.ranks, row.num_links_replaced) == (2, (1,), 2)
    assert (row.state_bytes, row.state_duration_s) == (2_000_000, 0.004)
    assert row.num_steps_redone == 1
    assert row.total_ms == pytest.approx(102)
    assert report.to_json(row)["total_ms"] == row.total_ms


def test_the_table_is_aligned_and_counts_from_the_fault() -> None:
    title, header, line = report.table(full_recovery().rows()).splitlines()
    assert "ms since the failure" in title
    assert len(header) == len(line)
    for cell in ("1.0", "5.0", "2 at 8.0", "50.0", "2.0 MB in 4.0 at 60.0", "102.0"):
        assert cell in line


def test_epochs_that_burned_belong_to_the_one_that_succeeded() -> None:
    story = Story()
    story.death(100, rank=1)
    story.membership(105, epoch=2, seated=[1])
    story.steps(120, epoch=2, ranks=[0])  # rank 2 dies before it gets there
    story.death(121, rank=2)
    story.membership(125, epoch=3, seated=[2])
    story.steps(200, epoch=3)
    (row,) = story.rows()
    assert (row.epoch, row.ranks) == (3, (1, 2))
    assert row.total_ms == pytest.approx(102)


def test_two_recoveries_are_two_rows() -> None:
    story = full_recovery()
    story.death(300, rank=0)
    story.membership(301, epoch=3, seated=[0])
    story.steps(350, epoch=3)
    first, second = story.rows()
    assert (first.epoch, second.epoch) == (2, 3)
    assert second.fault_s is None
    assert second.total_ms == pytest.approx(52)


def test_a_recovery_that_did_not_end_has_no_total() -> None:
    story = Story()
    story.death(100, rank=1)
    story.membership(105, epoch=2, seated=[1])
    (row,) = story.rows()
    assert row.total_ms is None and row.first_step_s is None
    assert "-" in report.table([row])


def test_a_restart_is_no_recovery() -> None:
    story = Story()
    story.death(100, rank=1)
    story.at(101, "restarted", attempt=1)
    story.membership(200, epoch=2, seated=[0, 1, 2], newcomer=False)
    assert story.rows() == []


def test_only_the_last_job_of_a_run_directory_counts() -> None:
    story = full_recovery()
    story.at(1000, "job_started", num_agents=1)
    story.membership(1001, epoch=1, seated=(0, 1, 2), newcomer=False)
    assert story.rows() == []


def test_a_late_report_of_a_lost_link_is_not_the_next_failure() -> None:
    story = full_recovery()
    story.at(106, "link_lost", rank=0, lost_rank=1, epoch=1)
    story.death(300, rank=0)
    story.membership(301, epoch=3, seated=[0])
    story.steps(350, epoch=3)
    assert story.rows()[1].detected_s == pytest.approx(1000.3)


def test_the_membership_counts_from_the_agent_that_heard_of_it_first() -> None:
    story = full_recovery()
    story.at(106, "membership", epoch=2, members=[])
    (row,) = story.rows()
    assert row.agreed_s == pytest.approx(1000.105)


def test_the_report_command_reads_a_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(str(tmp_path), "agent-0")
    for event in full_recovery().events:
        log.emit(event.name, **event.fields)
    log.close()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "links replaced" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        cli.main(["report", str(tmp_path / "nothing")])
    assert raised.value.code == 2
