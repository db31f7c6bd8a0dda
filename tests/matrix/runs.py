"""Runs the jobs of the matrix, and finds out which of their cells were survived."""

import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import POLL_S, LocalCluster, lines
from matrix.plan import Configuration, Kill, kills, victims
from verdict import assert_survivors_stayed

STALL_S = 60.0
"""A job that logs neither a step nor an event for so long hangs."""
MAX_FAILURES = 3
"""So many runs of a row may go wrong before the rest of it is given up."""
_ERROR = re.compile(
    r"^(?:\[?rank\d+\]?:\s*|\s*)([\w.]*(?:Error|Exception|State|Lost|Mismatch)): (.*)"
)
_CLEAR = ("ConfigError", "NoSourceForState")
"""A job that ends with one of these has said that it cannot survive this."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a cell."""

    word: str
    """ok, FAILED, or not survived."""
    reason: str = ""


OK = Result("ok")


class Broken(Exception):
    """A run that did not end as it should."""

    def __init__(self, result: Result, phases: Sequence[str] = ()) -> None:
        super().__init__(result.reason)
        self.result = result
        self.phases = phases
        """Where it was not survived; empty if that is not known."""


class Runs:
    """All runs below one folder; those that went wrong stay there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undisturbed: dict[Configuration, LocalCluster | Result] = {}
        self._number = 0

    def row(
        self, configuration: Configuration, victim: str, phases: Sequence[str]
    ) -> dict[str, Result]:
        """Return phase -> what became of it, for one victim."""
        known = configuration.all_phases
        phases = [p for p in known if p in phases and configuration.has_phase(p)]
        healthy = self._healthy(configuration)
        if isinstance(healthy, Result):
            return dict.fromkeys(phases, healthy)
        return self._cells(configuration, victim, phases, healthy)

    def _cells(
        self,
        configuration: Configuration,
        victim: str,
        phases: Sequence[str],
        healthy: LocalCluster,
        failures: Sequence[Result] = (),
    ) -> dict[str, Result]:
        """Run the phases together. If that goes wrong, run what may be good again."""
        if not phases:
            return {}
        if len(failures) >= MAX_FAILURES:
            text = f"not judged, {len(failures)} runs failed: {failures[-1].reason}"
            return dict.fromkeys(phases, Result("FAILED", text))
        try:
            fired = self._run(configuration, victim, phases, healthy)
        except Broken as broken:
            bad, half = broken.phases, len(phases) // 2
            if not bad and len(phases) == 1:
                bad = phases
            results = dict.fromkeys(bad, broken.result)
            rest = [phase for phase in phases if phase not in bad]
            for part in [rest] if bad else [phases[:half], phases[half:]]:
                failures = [*failures, broken.result]
                results |= self._cells(configuration, victim, part, healthy, failures)
            return results
        never = Result("FAILED", "the job never came to this phase in this step")
        return {phase: OK if phase in fired else never for phase in phases}

    def _run(
        self,
        configuration: Configuration,
        victim: str,
        phases: Sequence[str],
        healthy: LocalCluster,
    ) -> set[str]:
        """Run one job with its kills; return the phases in which all of them fired."""
        ranks = victims(victim, configuration.world_size)
        planned = list(kills(configuration, ranks, phases))
        name = f"{configuration.name}-{victim}"
        chaos = [spec for kill in planned for spec in kill.specs]
        with self._job(name, configuration, chaos=chaos) as job:
            wait_for_end(job)
            if (reason := reason_of(job)) is not None:
                # The last kill that happened is to blame; all of them if none did.
                steps = [event.fields["step"] for event in job.events("fault")]
                last = [k.phase for k in planned if not steps or k.step == steps[-1]]
                raise Broken(kept(job, reason), last)
            self._judge(job, healthy, planned)
        fired = {kill.phase for kill in planned if has_fired(job, kill)}
        shutil.rmtree(job.folder)
        return fired

    def _judge(
        self, job: LocalCluster, healthy: LocalCluster, planned: Sequence[Kill]
    ) -> None:
        """Raise Broken unless the ended job is as if nothing had happened."""
        deaths = Counter(event.fields["rank"] for event in job.events("fault"))
        try:
            difference = first_difference(job, healthy)
            if difference is not None:
                step, what = difference
                before = [kill.phase for kill in planned if kill.step <= step]
                raise Broken(kept(job, Result("FAILED", what)), before[-1:])
            assert_each_step_was_logged(job, healthy, deaths)
            assert job.digests() == healthy.digests(), "the final states differ"
            assert_survivors_stayed(job, deaths)
            job.check_nothing_is_left()
        except AssertionError as error:
            text = str(error).strip().splitlines()[0][:200]
            raise Broken(kept(job, Result("FAILED", text))) from None

    def _healthy(self, configuration: Configuration) -> LocalCluster | Result:
        if configuration not in self._undisturbed:
            self._undisturbed[configuration] = self._run_undisturbed(configuration)
        return self._undisturbed[configuration]

    def _run_undisturbed(self, configuration: Configuration) -> LocalCluster | Result:
        with self._job(configuration.name, configuration, num_standbys=0) as job:
            wait_for_end(job)
            if (reason := reason_of(job)) is not None:
                return kept(job, reason)
            job.check_nothing_is_left()
        return job

    def _job(
        self,
        name: str,
        configuration: Configuration,
        chaos: Sequence[str] = (),
        num_standbys: int = 1,
    ) -> LocalCluster:
        self._number += 1
        folder = self._folder / f"{self._number:03d}-{name.replace(' ', '-')}"
        folder.mkdir(parents=True)
        return LocalCluster(
            folder=folder,
            script=configuration.script,
            preload=configuration.preload,
            script_args=[
                *configuration.script_args,
                *configuration.files(folder),
                f"--loss-log={folder / 'losses.txt'}",
                f"--final-state={folder / 'final.txt'}",
            ],
            procs_per_agent=configuration.world_size,
            num_standbys=num_standbys,
            chaos=chaos,
        )


def kept(job: LocalCluster, result: Result) -> Result:
    """Say where the job is that went wrong."""
    where = f" (see {job.folder.name})" if result.word == "FAILED" else ""
    return replace(result, reason=result.reason + where)


def wait_for_end(job: LocalCluster) -> None:
    """Wait until a job has ended, or does nothing any more."""
    progress, since = -1, time.monotonic()
    while job.agents[0].poll() is None and time.monotonic() - since < STALL_S:
        files = [job.loss_log, *(job.run_dir / "events").glob("*")]
        size = sum(file.stat().st_size for file in files if file.exists())
        if size != progress:
            progress, since = size, time.monotonic()
        time.sleep(POLL_S)


def reason_of(job: LocalCluster) -> Result | None:
    """Say in a line why a job did not end well; None if it did."""
    exit_code = job.agents[0].poll()
    if exit_code == 0:
        return None
    if exit_code is None:
        return Result("FAILED", f"hang: nothing happened for {STALL_S:.0f} s")
    found = [m for line in job.output().splitlines() if (m := _ERROR.search(line))]
    if not found:
        tail = job.output().strip().splitlines()[-1:] or ["no output"]
        return Result("FAILED", tail[0][:200])
    name, text = found[0].groups()
    word = "not survived" if name.split(".")[-1] in _CLEAR else "FAILED"
    return Result(word, f"{name.split('.')[-1]}: {text}"[:200])


def has_fired(job: LocalCluster, kill: Kill) -> bool:
    faults = Counter(
        (event.fields["rank"], event.fields["phase"])
        for event in job.events("fault")
        if event.fields["step"] == kill.step
    )
    return faults == Counter(kill.deaths)


def logged(job: LocalCluster) -> list[tuple[int, int, str]]:
    """Return (step, rank, what a step made) for each line, in order of steps."""
    words = [line.split() for line in lines(job.loss_log)]
    return sorted((int(step), int(rank), facts) for step, rank, facts in words)


def first_difference(
    job: LocalCluster, healthy: LocalCluster
) -> tuple[int, str] | None:
    """Return the first step that differs, and what differs in it."""
    want = {(step, rank): facts for step, rank, facts in logged(healthy)}
    for step, rank, facts in logged(job):
        wanted = want.get((step, rank), "")
        if facts != wanted:
            parts = zip(facts.split(","), wanted.split(","), strict=False)
            names = [got.split(":")[0] for got, good in parts if got != good]
            return step, f"step {step} rank {rank}: {', '.join(names)} differ"
    return None


def assert_each_step_was_logged(
    job: LocalCluster, healthy: LocalCluster, deaths: Mapping[int, int]
) -> None:
    """Only a worker that died took a line along, or has its last steps made again.

    A newcomer begins at the newest state that is safe, which may be older than what
    the dead worker had logged: by two steps at most.
    """
    got = Counter((step, rank) for step, rank, _ in logged(job))
    for step, rank, _ in logged(healthy):
        got[step, rank] -= 1
    for (step, rank), extra in got.items():
        assert not extra or rank in deaths, f"step {step} rank {rank}: {extra:+} lines"
    for rank, num_deaths in deaths.items():
        extras = [extra for (_, of), extra in got.items() if of == rank]
        missing = sum(-extra for extra in extras if extra < 0)
        repeated = sum(extra for extra in extras if extra > 0)
        assert missing <= num_deaths, f"rank {rank}: {missing} steps not logged"
        assert repeated <= 2 * num_deaths, f"rank {rank}: {repeated} steps logged twice"
