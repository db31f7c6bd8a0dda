"""The example without Mnemosyne, spared from compiling what it never uses.

DeepSpeed on a CPU compiles a shared-memory operation for inference, 47 s at first
use, and asks a compiler for it at every start. Leaving it out makes the plain job
faster, so it is fair to it.
"""

import runpy
import sys

import deepspeed.ops

from jobs import TRAIN

deepspeed.ops.__compatible_ops__ = {}
sys.path.insert(0, str(TRAIN.parent))
sys.argv[0] = str(TRAIN)
runpy.run_path(str(TRAIN), run_name="__main__")
