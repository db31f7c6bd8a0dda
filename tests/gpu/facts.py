"""Tells what this python has for jobs on a GPU."""

from importlib.util import find_spec

import torch

print("nccl", ".".join(map(str, torch.cuda.nccl.version())))
for name in ("deepspeed", "megatron"):
    print(name, "yes" if find_spec(name) else "no")
