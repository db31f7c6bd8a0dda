"""The demo: train with megatron.core on 8 ranks, kill a worker, go on, compare.

Exits with 0 only if every loss is the same, bit for bit, and no other worker was
restarted.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_demo import Demo  # noqa: E402
from prepare import prepare  # noqa: E402


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="mnemosyne-corpus-") as folder:
        corpus = Path(folder, "corpus")
        prepare(corpus)
        demo = Demo(
            title="a GPT (TP 2 x PP 2 x DP 2, distributed optimizer)",
            script=Path(__file__).with_name("train_core.py"),
            script_args=[f"--data={corpus}", "--tensor=2", "--pipeline=2"],
            num_ranks=8,
            steps=30,
            victim=5,
            kill_step=20,
        )
        return demo.run()


if __name__ == "__main__":
    sys.exit(main())
