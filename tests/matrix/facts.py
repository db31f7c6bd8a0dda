"""What the scripts of the matrix log: digests of all that a step changes."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch


def digest(value: Any) -> str:
    """Return the SHA-256 of nested values and the bits of the tensors in them."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if torch.is_tensor(value):
            flat = value.detach().contiguous().flatten()
            sha.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            add(sorted(value.items()))
        elif isinstance(value, list | tuple):
            sha.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r};".encode())

    add(value)
    return sha.hexdigest()


def append(path: Path, line: str) -> None:
    """Add a line to a file that all ranks share; one write is one whole line."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)
