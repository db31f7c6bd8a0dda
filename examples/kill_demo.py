"""A demo: train, kill a worker, go on, and compare with a run without the kill."""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mnemosyne_plugin.events import read_events

RUN_TIMEOUT_S = 300
Losses = dict[tuple[int, int], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What is trained, and who dies.

    The script takes ``--steps`` and ``--loss-log``: one line per step and rank, with
    the loss as a hexadecimal float.
    """

    title: str
    script: Path
    script_args: Sequence[str] = ()
    num_ranks: int
    steps: int
    victim: int
    kill_step: int

    def run(self) -> int:
        """Return 0 only if every loss is the same, bit for bit, and no other worker
        was restarted.
        """
        with tempfile.TemporaryDirectory(prefix="mnemosyne-demo-") as name:
            folder = Path(name)
            say(f"1. {self.num_ranks} workers train {self.title}, undisturbed")
            healthy = self._train(folder / "healthy")
            say(
                f"2. the same, but rank {self.victim} gets SIGKILL in step "
                f"{self.kill_step}"
            )
            chaos = f"kill rank={self.victim} step={self.kill_step} phase=backward"
            killed = self._train(folder / "killed", f"--chaos={chaos}")
            say("3. the loss across the failure")
            print(plot(mean_over_ranks(killed), self.kill_step))
            say("4. the verdict")
            problems = self._compare(healthy, killed)
            problems += self._check_survivors(folder / "killed")
        for problem in problems:
            print(f"WRONG: {problem}")
        if not problems:
            print(
                f"all {len(killed)} losses are bit-identical to those of the "
                f"undisturbed run;\nranks other than {self.victim} kept their "
                "processes."
            )
        return 1 if problems else 0

    def _train(self, folder: Path, *options: str) -> Losses:
        """Run the script under `mnemosyne run`; return what it logged."""
        loss_log = folder / "losses.txt"
        folder.mkdir()
        arguments = ["run", f"--nproc-per-node={self.num_ranks}", "--standby=1"]
        arguments += [f"--run-dir={folder}", *options, str(self.script)]
        arguments += [f"--steps={self.steps}", f"--loss-log={loss_log}"]
        arguments += self.script_args
        print("$ mnemosyne", shlex.join(arguments), flush=True)
        command = [str(Path(sys.executable).with_name("mnemosyne")), *arguments]
        if (code := subprocess.run(command, timeout=RUN_TIMEOUT_S).returncode) != 0:
            sys.exit(f"the run failed with exit code {code}")
        rows = (line.split() for line in loss_log.read_text().splitlines())
        return {
            (int(step), int(rank)): float.fromhex(loss) for step, rank, loss in rows
        }

    def _compare(self, healthy: Losses, killed: Losses) -> list[str]:
        """Return every way in which the killed run's losses differ."""
        problems = [
            f"step {step} rank {rank}: loss {loss.hex()}, undisturbed "
            f"{healthy.get((step, rank), float('nan')).hex()}"
            for (step, rank), loss in sorted(killed.items())
            if healthy.get((step, rank)) != loss
        ]
        # A worker that dies after a step's commit takes its own log line along.
        lost = {(self.kill_step, self.victim)}
        missing = healthy.keys() - killed.keys() - lost
        return problems + [f"step {s} rank {r}: no loss" for s, r in sorted(missing)]

    def _check_survivors(self, run_dir: Path) -> list[str]:
        """Return what is wrong with who sat where, by the agents' own events."""
        pids: dict[int, list[int]] = {rank: [] for rank in range(self.num_ranks)}
        for event in read_events(run_dir):
            if event.name == "seated":
                rank, pid = event.fields["rank"], event.fields["pid"]
                pids[rank] += [pid] if pid not in pids[rank] else []
        expected = {rank: 2 if rank == self.victim else 1 for rank in pids}
        return [
            f"rank {rank} was held by {len(pids[rank])} processes, not {count}"
            for rank, count in expected.items()
            if len(pids[rank]) != count
        ]


def say(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def mean_over_ranks(losses: Losses) -> list[float]:
    """Return the mean loss of each step, over the ranks that logged it."""
    steps = range(1 + max(step for step, _ in losses))
    by_step = [[loss for (s, _), loss in losses.items() if s == step] for step in steps]
    return [sum(values) / len(values) for values in by_step]


def plot(values: list[float], marked: int, height: int = 10) -> str:
    """Draw a curve as text, one column per value, with one value marked."""
    low, high = min(values), max(values)
    scale = (height - 1) / ((high - low) or 1.0)
    rows = [round((high - value) * scale) for value in values]
    text = []
    for row in range(height):
        cells = (
            "*" if rows[x] == row else ":" if x == marked else " "
            for x in range(len(values))
        )
        label = f"{high - row / scale:6.2f}" if row in (0, height - 1) else " " * 6
        text.append(f"{label} |" + "".join(cells))
    text.append(" " * 7 + "+" + "-" * len(values))
    text.append(" " * (8 + marked) + f"^ kill -9 in step {marked}")
    return "\n".join(text)
