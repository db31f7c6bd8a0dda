"""The launcher with real processes, and scripts that do not train.

Which evidence leads to which decision is for tests/unit/test_membership.py; here it
is about processes, signals, files and environments.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import MARKER, POLL_S, ROOT, LocalCluster, free_port, send_signal

HERE = Path(__file__).parent
Launch = Callable[..., "Job"]

OURS = [
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"),
    *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS"),
    *("MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
]

SHOW_ENV = f"""
import json, os
names = {OURS} + ["MASTER_PORT", "TORCHELASTIC_ERROR_FILE"]
assert os.environ["TORCHELASTIC_RUN_ID"]
line = json.dumps({{name: os.environ.get(name) for name in names}})
os.write(1, f"{{line}}\\n".encode())  # one write, so that lines do not mix
"""

TRAIN = """
import os, sys, time
from launch_fakes import manager
manager.protect()
"""
"""Begin of a script whose ranks are protected from then on."""


class Job(LocalCluster):
    """A job under `mnemosyne run`, with the manager of launch_fakes."""

    def _start_agent(self, agent: int, port: str) -> "subprocess.Popen[bytes]":
        nodes = [f"--nnodes={self.num_agents}", f"--node-rank={agent}"]
        nodes += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        main = "import launch_fakes; launch_fakes.launch()"
        command = [
            *(sys.executable, "-c", main),
            *(nodes if self.num_agents > 1 else ["--standalone"]),
            f"--nproc-per-node={self.procs_per_agent}",
            f"--standby={self.num_standbys}",
            f"--run-dir={self.run_dir}",
            *self.launch_args,
        ]
        own = {MARKER: self._job, "TMPDIR": str(self._temp)}
        own["PYTHONPATH"] = f"{ROOT}:{HERE}:{self.folder}"
        with self.output_file.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                cwd=self.folder,
                start_new_session=True,
            )

    def wait_for_events(self, name: str, count: int) -> None:
        self.wait_until(lambda job: len(job.events(name)) >= count)

    def wait_for_warm_standby(self) -> None:
        """Wait for the fourth worker; the third, a cold standby, may never be ready."""
        self.wait_until(
            lambda job: any(
                event.fields["worker_id"] == 4 for event in job.events("worker_ready")
            )
        )


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with ExitStack() as stack:

        def start(
            source: str,
            *args: str,
            num_agents: int = 1,
            procs_per_agent: int = 2,
            num_standbys: int = 0,
            target: Sequence[str] = (),
        ) -> Job:
            script = tmp_path / "script.py"
            script.write_text(textwrap.dedent(source))
            job = Job(
                folder=tmp_path,
                script=script,
                num_agents=num_agents,
                procs_per_agent=procs_per_agent,
                num_standbys=num_standbys,
                launch_args=[*args, *(target or [str(script)])],
            )
            return stack.enter_context(job)

        yield start


def environments(output: str) -> dict[str, Mapping[str, str]]:
    """Return RANK -> environment, as SHOW_ENV printed them."""
    found = [json.loads(line) for line in output.splitlines() if line[:1] == "{"]
    return {env["RANK"]: env for env in found}


def without(env: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def test_ranks_get_the_environment_that_torchrun_gives(launch: Launch) -> None:
    job = launch(SHOW_ENV, "--max-restarts=2", "--role=trainer")
    assert job.wait() == [0], job.output()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--max-restarts=2", "--role=trainer"]
    oracle = subprocess.run(
        [*torchrun, str(job.script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(job.folder)},
    )
    varies = ("MASTER_PORT", "TORCHELASTIC_ERROR_FILE")
    ours, theirs = environments(job.output()), environments(oracle.stdout)
    assert set(ours) == set(theirs) == {"0", "1"}
    for rank, env in ours.items():
        assert without(env, *varies) == without(theirs[rank], *varies)
        assert env["TORCHELASTIC_ERROR_FILE"].endswith(f"attempt_0/{rank}/error.json")
    job.check_nothing_is_left()


def test_two_agents_lay_out_their_ranks_one_after_the_other(launch: Launch) -> None:
    job = launch(SHOW_ENV, num_agents=2)
    assert job.wait() == [0, 0], job.output()
    envs = environments(job.output())
    assert sorted(envs) == ["0", "1", "2", "3"]
    for rank, env in envs.items():
        agent, local_rank = divmod(int(rank), 2)
        assert (env["GROUP_RANK"], env["LOCAL_RANK"]) == (str(agent), str(local_rank))
        assert (env["WORLD_SIZE"], env["GROUP_WORLD_SIZE"]) == ("4", "2")
        assert f"--master-port={env['MASTER_PORT']}" in job.agents[0].args
    job.check_nothing_is_left()


def test_agents_meet_by_a_c10d_rendezvous(launch: Launch) -> None:
    endpoint = f"localhost:{free_port()}"
    rdzv = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=7"]
    job = launch(SHOW_ENV, *rdzv, num_agents=2, procs_per_agent=1)
    assert job.wait() == [0, 0], job.output()
    envs = environments(job.output())
    assert sorted(envs) == ["0", "1"]
    assert envs["0"]["MASTER_PORT"] == envs["1"]["MASTER_PORT"] != endpoint[-5:]
    job.check_nothing_is_left()


def test_a_script_sees_its_arguments_and_its_own_folder(launch: Launch) -> None:
    source = "import sys; print(sys.argv[1:], sys.path[0], __name__, flush=True)"
    job = launch(
        source, procs_per_agent=1, target=["script.py", "b c", "--rank=${local_rank}"]
    )
    assert job.wait() == [0], job.output()
    assert f"['b c', '--rank=0'] {job.folder} __main__" in job.output()


def test_a_module_is_run_as_python_m_does(launch: Launch) -> None:
    source = "import sys; print('ran', sys.argv, __name__)"
    job = launch(source, procs_per_agent=1, target=["-m", "script", "x"])
    assert job.wait() == [0], job.output()
    assert f"ran ['{job.script}', 'x'] __main__" in job.output()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os.environ['RANK'] == '1' and 1 / 0", "ZeroDivisionError"),
        ("import os, sys; os.environ['RANK'] == '1' and sys.exit('bad')", "bad"),
        ("import os, sys; os.environ['RANK'] == '1' and sys.exit(7)", "exit code 7"),
        ("import os; os.environ['RANK'] == '1' and os._exit(7)", "exit code 7"),
        ("1 +", "SyntaxError"),
    ],
)
def test_an_error_in_set_up_ends_the_job_at_once(
    launch: Launch, source: str, reason: str
) -> None:
    job = launch(source + "\nimport time; time.sleep(600)")
    assert job.wait() == [1]
    output = job.output()
    assert reason in output
    assert "the job failed: rank" in output and "in set-up" in output
    assert output.count("Traceback") <= 1
    assert "runpy" not in output
    job.check_nothing_is_left()


def test_the_error_file_is_written_as_record_does(launch: Launch) -> None:
    job = launch("raise ValueError('no')", procs_per_agent=1)
    assert job.wait() == [1]
    (file,) = job.run_dir.rglob("error.json")
    error = json.loads(file.read_text())["message"]
    assert error["message"] == "ValueError: no"
    assert "Traceback" in error["extraInfo"]["py_callstack"]


def test_streams_are_kept_per_rank(launch: Launch, tmp_path: Path) -> None:
    source = """
        import os, sys
        print("out", os.environ["RANK"])
        os.write(2, b"err " + os.environ["RANK"].encode())
    """
    folder = tmp_path / "logs"
    job = launch(source, f"--log-dir={folder}", "-r", "3", "--tee", "1:1")
    assert job.wait() == [0], job.output()
    found = {
        str(path.relative_to(folder)).partition("/")[2]: path.read_text()
        for path in folder.rglob("*.log")
    }
    assert found == {
        "attempt_0/0/stdout.log": "out 0\n",
        "attempt_0/0/stderr.log": "err 0",
        "attempt_0/1/stdout.log": "out 1\n",
        "attempt_0/1/stderr.log": "err 1",
    }
    assert "[default1]:out 1" in job.output() and "out 0" not in job.output()


def test_a_traceback_that_went_to_a_file_is_shown_once(launch: Launch) -> None:
    job = launch("1 / 0", "-r", "3", procs_per_agent=1)
    assert job.wait() == [1]
    assert job.output().count("ZeroDivisionError") == 1
    assert "stderr.log" in job.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(launch: Launch, number: signal.Signals) -> None:
    source = (
        "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    )
    job = launch(source, num_standbys=1)
    job.wait_for_events("seated", 2)
    job.agents[0].send_signal(number)
    assert job.wait(10) == [128 + number], job.output()
    job.check_nothing_is_left()


def test_a_signal_to_one_agent_ends_all(launch: Launch) -> None:
    job = launch("import time; time.sleep(600)", num_agents=2, num_standbys=1)
    job.wait_for_events("seated", 4)
    job.agents[1].send_signal(signal.SIGTERM)
    assert job.wait(10) == [143, 143], job.output()
    job.check_nothing_is_left()


def test_a_worker_that_ignores_sigterm_is_killed(launch: Launch) -> None:
    source = """
        import signal, time
        signal.signal(signal.SIGTERM, lambda *_: print("no", flush=True))
        print("ready", flush=True)
        while True:
            time.sleep(600)
    """
    job = launch(source, "--shutdown-timeout=1", procs_per_agent=1)
    job.wait_until(lambda job: "ready" in job.output())
    job.agents[0].send_signal(signal.SIGINT)
    assert job.wait(10) == [130], job.output()
    assert "no" in job.output()
    job.check_nothing_is_left()


def test_a_signal_ends_an_agent_that_still_waits_for_the_others(
    launch: Launch,
) -> None:
    job = launch("", "--nnodes=2", num_agents=1)
    job.wait_until(lambda job: len(job.processes()) == 2)  # the agent, its nursery
    job.agents[0].send_signal(signal.SIGTERM)
    assert job.wait(10) == [143], job.output()
    job.check_nothing_is_left()


def test_workers_die_with_their_agent(launch: Launch) -> None:
    job = launch("import time; time.sleep(600)", num_standbys=1)
    job.wait_for_events("worker_ready", 3)
    job.agents[0].kill()
    job.wait()
    job.check_nothing_is_left()


def test_an_agent_that_loses_its_leader_ends_its_workers(launch: Launch) -> None:
    job = launch("import time; time.sleep(600)", num_agents=2)
    job.wait_for_events("seated", 4)
    job.agents[0].kill()
    assert job.wait(10)[1] == 3
    assert "the leader is gone" in job.output()
    job.check_nothing_is_left()


def test_a_kill_in_set_up_restarts_the_job(launch: Launch) -> None:
    source = """
        import os, signal
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        # One write, so that the lines of two ranks do not mix.
        os.write(1, f"attempt {attempt} {os.environ['MASTER_PORT']}\\n".encode())
        if attempt == "0" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    job = launch(source, num_standbys=1)
    assert job.wait() == [0], job.output()
    lines = {line for line in job.output().splitlines() if line[:8] == "attempt "}
    assert sorted(line.split()[1] for line in lines) == ["0", "1"]
    assert len({line.split()[2] for line in lines}) == 2  # a fresh store
    job.check_nothing_is_left()


def test_kills_in_set_up_do_not_restart_for_ever(launch: Launch) -> None:
    job = launch("import os; os.kill(os.getpid(), 9)", procs_per_agent=1)
    assert job.wait() == [1], job.output()
    assert len(job.events("restarted")) == 3
    assert "SIGKILL" in job.output()
    job.check_nothing_is_left()


@pytest.mark.parametrize("num_agents", [1, 2])
@pytest.mark.parametrize("num_standbys", [0, 1])
def test_a_killed_rank_is_seated_anew_and_the_others_stay(
    launch: Launch, num_agents: int, num_standbys: int
) -> None:
    source = TRAIN + "manager.wait_for_epoch(2)\nprint('epoch', manager.epoch)"
    job = launch(source, num_agents=num_agents, num_standbys=num_standbys)
    job.wait_for_events("worker_ready", num_agents * (2 + num_standbys))
    last = 2 * num_agents - 1
    job.wait_for_events("protected", last + 1)
    before = [job.pid(rank) for rank in range(last + 1)]
    job.kill(last)
    assert job.wait() == [0] * num_agents, job.output()
    assert [job.pid(rank) for rank in range(last)] == before[:-1]
    assert len(job.pids(last)) == 2
    newcomer = job.events("seated")[-1].fields
    assert (newcomer["rank"], newcomer["newcomer"]) == (last, True)
    job.check_nothing_is_left()


def test_an_exception_that_comes_back_ends_the_job(launch: Launch) -> None:
    source = (
        TRAIN
        + """
if manager.rank == 1:
    from pathlib import Path
    while not Path("go").exists():  # when all are protected
        time.sleep(0.01)
    raise ValueError("of the user")
manager.wait_for_epoch(9)
"""
    )
    job = launch(source, num_standbys=1)
    job.wait_for_events("protected", 2)
    (job.folder / "go").touch()
    assert job.wait() == [1], job.output()
    assert "rank 1 ended with exit code 1 again after its recovery" in job.output()
    assert job.output().count("ValueError: of the user") == 2  # once per worker
    assert len(job.events("membership")) == 2
    job.check_nothing_is_left()


@pytest.mark.parametrize(
    ("error", "reason", "exit_code"),
    [
        ("OutOfMemoryError('CUDA out of memory')", "2: out of memory", 1),
        ("AcceleratorError('No CUDA GPUs are available')", "100: no CUDA", 3),
    ],
)
def test_some_errors_of_devices_no_new_worker_is_tried_for(
    launch: Launch, error: str, reason: str, exit_code: int
) -> None:
    source = f"""{TRAIN}
if manager.rank == 1:
    import torch
    manager.version = 7
    raise torch.{error}
manager.wait_for_epoch(9)
"""
    job = launch(source, num_standbys=1)
    assert job.wait() == [exit_code], job.output()
    assert f"GPU of local rank 1: CUDA error {reason}" in job.output()
    assert job.output().count("Traceback") == 1
    (told,) = job.events("device_failed")
    assert (told.fields["rank"], told.fields["step"]) == (1, 7)
    assert len(job.events("membership")) == 1
    job.check_nothing_is_left()


def test_standbys_start_with_the_modules_that_the_script_imports(
    launch: Launch,
) -> None:
    source = r"""
        import sys
        sys.stdout.write(f"warm {'wave' in sys.modules} {'private' in sys.modules}\n")
        from launch_fakes import manager
        manager.protect()
        if manager.rank == 0 and not manager.is_newcomer:
            manager.tell_modules(["wave", "private", "no.such.module"])
        manager.wait_for_epoch(2)
    """
    job = launch(source, num_standbys=1)
    (job.folder / "private.py").write_text("raise SystemExit('only for workers')")
    job.wait_for_warm_standby()
    job.wait_for_events("protected", 2)
    job.kill(1)
    assert job.wait() == [0], job.output()
    lines = sorted(line for line in job.output().splitlines() if line[:4] == "warm")
    assert lines == ["warm False False"] * 2 + ["warm True False"]
    job.check_nothing_is_left()


def test_a_preloaded_module_is_there_before_the_script(launch: Launch) -> None:
    source = "import sys; print('there', 'wave' in sys.modules, flush=True)"
    job = launch(source, "--preload=json", "--preload=wave", procs_per_agent=1)
    assert job.wait() == [0], job.output()
    assert "there True" in job.output()


@pytest.mark.parametrize(
    ("module", "reason"),
    [("missing", "ModuleNotFoundError"), ("busy", "importing torch, busy started")],
)
def test_what_cannot_be_preloaded_ends_the_job(
    launch: Launch, tmp_path: Path, module: str, reason: str
) -> None:
    busy = "import threading; threading.Thread(target=threading.Event().wait,"
    (tmp_path / "busy.py").write_text(busy + " daemon=True).start()")
    job = launch("", f"--preload={module}", procs_per_agent=1)
    assert job.wait(20) == [3], job.output()
    assert reason in job.output()
    job.check_nothing_is_left()


def test_a_nursery_that_dies_is_replaced(launch: Launch) -> None:
    job = launch(TRAIN + "manager.wait_for_epoch(3)", num_standbys=0)
    job.wait_for_events("protected", 2)
    workers = {job.pid(0), job.pid(1), job.agents[0].pid}
    (nursery,) = set(job.processes()) - workers
    os.kill(nursery, signal.SIGKILL)
    for count in (1, 2):
        job.kill(1)
        job.wait_for_events("seated", 2 + count)
    assert job.wait() == [0], job.output()
    job.check_nothing_is_left()


def test_a_warm_nursery_that_dies_is_replaced(launch: Launch) -> None:
    source = TRAIN + "manager.tell_modules(['wave'])\nmanager.wait_for_epoch(3)"
    job = launch(source, num_standbys=1)
    job.wait_for_warm_standby()
    job.wait_for_events("protected", 2)
    others = {e.fields["pid"] for e in job.events("worker_ready")}
    others.add(job.agents[0].pid)
    job.wait_until(lambda job: len(set(job.processes()) - others) == 1)
    (nursery,) = set(job.processes()) - others
    os.kill(nursery, signal.SIGKILL)
    for count in (1, 2):
        job.kill(1)
        job.wait_for_events("seated", 2 + count)
    assert job.wait() == [0], job.output()
    job.check_nothing_is_left()


def test_a_job_that_may_replace_nobody_ends_and_names_the_checkpoint(
    launch: Launch,
) -> None:
    source = f"""{TRAIN}
manager.channel.send("checkpoint", folder="/saved/step8")
if manager.rank == 1:
    while not os.path.exists("go"):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
time.sleep(600)
    """
    job = launch(source, "--max-restarts=0", num_standbys=1)
    job.wait_for_events("protected", 2)
    (job.folder / "go").touch()
    assert job.wait(20) == [1], job.output()
    assert "rank 1 was killed by signal 9; --max-restarts 0 is used up" in job.output()
    assert "/saved/step8" in job.output()
    job.check_nothing_is_left()


def test_a_job_whose_nurseries_all_die_ends_and_names_the_checkpoint(
    launch: Launch,
) -> None:
    source = f"""{TRAIN}
manager.channel.send("checkpoint", folder="/saved/step8")
time.sleep(600)
    """
    job = launch(source, procs_per_agent=1)
    job.wait_for_events("protected", 1)
    killed: set[int] = set()
    while job.agents[0].poll() is None:
        ours = {job.agents[0].pid, *job.pids(0)}
        for pid in set(job.processes()) - ours - killed:
            send_signal(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(POLL_S)
    assert job.wait(20) == [3], job.output()
    assert "its nursery ended with exit code -9" in job.output()
    assert "/saved/step8" in job.output()
    job.check_nothing_is_left()


def test_the_agent_has_no_more_descriptors_after_many_kills(launch: Launch) -> None:
    job = launch(TRAIN + "manager.wait_for_epoch(12)", num_standbys=1)
    job.wait_for_events("protected", 2)
    counts = []
    for epoch in range(2, 12):
        job.kill(1)
        job.wait_for_events("protected", 1 + epoch)
        job.wait_for_events("worker_ready", 2 + epoch)
        counts.append(len(os.listdir(f"/proc/{job.agents[0].pid}/fd")))
    assert counts[-1] <= counts[0]
    job.kill(1)
    assert job.wait() == [0], job.output()
    job.check_nothing_is_left()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--no-python", "script.py"], "--no-python"),
        (["--standby=-1", "script.py"], "--standby"),
        (["--max-restarts=-1", "script.py"], "--max-restarts"),
        (["--nproc-per-node=many", "script.py"], "nproc_per_node"),
        (["--nnodes=2:1", "script.py"], "min_nodes"),
        (["-r", "9", "script.py"], "9 does not match"),
        (["--signals-to-handle=SIGNOPE", "script.py"], "SIGNOPE"),
        (["no_such.py"], "no_such.py"),
        (["--no-such-option", "script.py"], "--no-such-option"),
        (["--chaos=explode", "script.py"], "explode"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    tmp_path: Path, args: list[str], reason: str
) -> None:
    (tmp_path / "script.py").touch()
    command = [sys.executable, "-m", "mnemosyne_plugin.cli", "run", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["script.py"]
