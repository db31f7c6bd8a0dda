"""The clock of benchmarks/recovery.py."""

from jobs import NUM_RANKS, Line, recovered_at


def finished(step: int, time_s: float, ranks: range = range(NUM_RANKS)) -> list[Line]:
    return [Line(step=step, rank=rank, time_s=time_s) for rank in ranks]


def test_the_step_in_flight_ends_a_recovery_without_a_rollback() -> None:
    lines = finished(7, 1.0) + finished(8, 3.0) + finished(9, 4.0)
    assert recovered_at(lines, killed_at=2.0) == (8, 3.0)


def test_steps_made_again_after_a_rollback_do_not_count() -> None:
    lines = finished(7, 1.0) + finished(5, 8.0) + finished(6, 8.1) + finished(7, 8.2)
    assert recovered_at([*lines, *finished(8, 8.3)], killed_at=2.0) == (8, 8.3)


def test_a_step_that_some_rank_had_finished_before_the_kill_does_not_count() -> None:
    lines = finished(7, 1.0, range(1)) + finished(7, 3.0, range(1, NUM_RANKS))
    assert recovered_at([*lines, *finished(8, 3.5)], killed_at=2.0) == (8, 3.5)


def test_a_log_line_that_died_with_its_worker_moves_the_end_to_the_next_step() -> None:
    lines = finished(7, 1.0) + finished(8, 2.1, range(1, NUM_RANKS)) + finished(9, 3.0)
    assert recovered_at(lines, killed_at=2.0) == (9, 3.0)
