"""examples/megatron_gpt/pretrain_gpt.sh: what it starts, as Megatron-LM reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEGATRON_LM = Path(sys.prefix) / "megatron-lm-0.17.0"
SCRIPT = ROOT / "examples/megatron_gpt/pretrain_gpt.sh"
# What `mnemosyne run` was given, one word per line.
LAUNCHER = '#!/bin/sh\nprintf "%s\\n" "$@"\n'
READ = """
import argparse, json, sys
import cpu_cuda
from megatron.training import arguments
parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
print(json.dumps([vars(parser.parse_args(w)) for w in json.load(sys.stdin)],
                 default=str))
"""


def started(folder: Path, layout: str, *words: str) -> list[str]:
    """Return the words that the script gives to the launcher."""
    launcher = folder / "bin" / "mnemosyne"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    for name in ("corpus.idx", "pretrain_gpt.py"):
        (folder / name).touch()
    env = {
        **os.environ,
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
        "MEGATRON_LM": str(folder),
        "DATA": str(folder / "corpus"),
        "CPU": "1",
    }
    command = ["bash", str(SCRIPT), layout, *words]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_megatron_knows_all_that_the_example_gives_it(tmp_path: Path) -> None:
    chaos = "--chaos=kill rank=2 step=3"
    small = started(tmp_path, "tp2_dp2", chaos, "--", "--save", "here and there")
    large = started(tmp_path, "tp2_pp2_dp2")
    assert small[:4] == ["run", "--nproc-per-node=4", "--standby=1", chaos]
    assert large[:2] == ["run", "--nproc-per-node=8"]

    scripts = [str(ROOT / "tests/megatron/on_cpu.py"), f"{tmp_path}/pretrain_gpt.py"]
    given = []
    for words in (small, large):
        first = words.index(scripts[0])
        assert words[first : first + 2] == scripts
        given.append(words[first + 2 :])
    path = os.pathsep.join([str(MEGATRON_LM), str(ROOT / "tests/megatron")])
    result = subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps(given),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    four, eight = json.loads(result.stdout)
    assert (four["mnemosyne"], four["save"]) == (True, "here and there")
    assert (four["tensor_model_parallel_size"], four["bf16"]) == (2, False)
    assert eight["pipeline_model_parallel_size"] == 2
    assert eight["use_distributed_optimizer"]


@pytest.mark.parametrize(
    ("layout", "message"), [("tp2_dp2", "has no pretrain_gpt.py"), ("", "usage")]
)
def test_what_is_missing_is_said(tmp_path: Path, layout: str, message: str) -> None:
    result = subprocess.run(
        ["bash", str(SCRIPT), *filter(None, [layout])],
        env={**os.environ, "MEGATRON_LM": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert message in result.stderr
