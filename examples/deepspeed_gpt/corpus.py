"""Real text as a dataset of byte sequences."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

STANDARD_LIBRARY_BYTES = 4 << 20
"""How much of Python's own sources the default corpus takes; reads in 10 ms."""


class CorpusError(ValueError):
    """The text cannot be trained on; the message says why in one line."""


class ByteCorpus(Dataset[tuple[Tensor, Tensor]]):
    """Cuts text into sequences; an item is (bytes, the same moved by one)."""

    def __init__(self, text: bytes, sequence_length: int) -> None:
        if len(text) < sequence_length + 1:
            raise CorpusError(
                f"corpus has {len(text)} bytes, but one sequence needs "
                f"{sequence_length + 1}; give more text with --data"
            )
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._sequence_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self._sequence_length
        window = self._bytes[first : first + self._sequence_length + 1].long()
        return window[:-1], window[1:]


def load_text(path: Path | None) -> bytes:
    """Return the text of a file or folder, by default Python's standard library.

    The same files give the same bytes on every rank: folders are read in the order
    of their names. Hidden and binary files of a folder are left out.
    """
    if path is None:
        return _standard_library()
    try:
        if path.is_dir():
            texts = (file.read_bytes() for file in _files(path))
            text = b"".join(text for text in texts if b"\0" not in text)
        else:
            text = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read corpus {path}: {error.strerror}") from error
    if not text:
        raise CorpusError(f"corpus {path} holds no text")
    return text


def _standard_library() -> bytes:
    text = bytearray()
    for file in _files(Path(sysconfig.get_path("stdlib"))):
        if file.suffix == ".py":
            text += file.read_bytes()
        if len(text) >= STANDARD_LIBRARY_BYTES:
            break
    return bytes(text[:STANDARD_LIBRARY_BYTES])


def _files(folder: Path) -> Iterator[Path]:
    skipped = {"__pycache__", "site-packages", "dist-packages", "test"}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in skipped and name[0] != "."
        )
        for name in sorted(names):
            if name[0] != ".":
                yield Path(parent, name)
