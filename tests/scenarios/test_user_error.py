"""Errors that no new worker can mend."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import LocalCluster, training

SCRIPT = Path(__file__).parent / "scripts" / "raise_at_step.py"
Job = Callable[..., LocalCluster]


@pytest.mark.timeout(90)
def test_an_exception_that_comes_back_ends_the_job_with_its_traceback(
    train: Job,
) -> None:
    job = train(steps=20, script=SCRIPT)
    assert job.wait(60) == [1], job.output()
    assert len(job.pids(1)) == 2, "one new worker gets its chance, no more"
    assert "ValueError: a bug of the user at step 6" in job.output()
    assert job.losses().keys() == {(s, r) for s in range(6) for r in range(4)}
    job.check_nothing_is_left()


@pytest.mark.timeout(90)
def test_ranks_that_stay_out_of_step_end_the_job(train: Job) -> None:
    script = SCRIPT.with_name("out_of_step.py")
    job = train(steps=20, script=script, procs_per_agent=2, num_standbys=0)
    assert job.wait(60) == [3], job.output()
    assert "not brought the job past step 6, and no worker was lost" in job.output()
    assert "The last failure: all-reduce of group" in job.output()
    assert [len(job.pids(rank)) for rank in range(2)] == [1, 1]
    job.check_nothing_is_left()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [None, b"", b"short"])
def test_a_bad_corpus_is_a_one_line_error(text: bytes | None, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    if text is not None:
        corpus.write_bytes(text)
    job = training(tmp_path, steps=5)
    job.script_args = [*job.script_args, f"--data={corpus}"]
    with job:
        assert job.wait(50) != [0]
        lines = job.output().splitlines()
        errors = {line for line in lines if "train.py: error:" in line}
        assert len(errors) == 1, job.output()
        assert "Traceback" not in job.output()
    job.check_nothing_is_left()
