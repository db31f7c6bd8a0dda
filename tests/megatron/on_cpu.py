"""Run a script of Megatron-LM on the CPU: ``on_cpu.py pretrain_gpt.py ...``.

The script is run as it would run alone, with what Megatron needs of torch.cuda put in
place in front of it.
"""

import runpy
import sys
from pathlib import Path

import cpu_cuda

cpu_cuda.claim_gpus()

if __name__ == "__main__":  # and not in the processes that Megatron spawns
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
