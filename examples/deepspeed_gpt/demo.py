"""The demo: train with DeepSpeed, kill a worker, go on, compare.

Exits with 0 only if every loss is the same, bit for bit, and no other worker was
restarted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_demo import Demo  # noqa: E402

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    demo = Demo(
        title="a GPT",
        script=Path(__file__).with_name("train.py"),
        num_ranks=4,
        steps=60,
        victim=2,
        # By then the standby has imported what the workers use, as in any longer job.
        kill_step=40,
    )
    sys.exit(demo.run())
