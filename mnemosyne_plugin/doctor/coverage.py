"""The versions that this package covers, and what NCCL can do since when."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """From ``first``, up to and without ``end``."""

    first: tuple[int, ...]
    end: tuple[int, ...]

    def cover(self, version: str) -> bool:
        """Whether it is one of them: no early or unknown one is."""
        return self.first <= parse(version) < self.end and not is_early(version)

    def __str__(self) -> str:
        """Say them as a reader would: 0.19.8 to 0.19."""
        last = (*self.end[:-1], self.end[-1] - 1)
        return f"{dotted(self.first)} to {dotted(last)}"


TORCH = Versions((2, 11), (2, 14))
PACKAGES: dict[str, Versions | None] = {
    "DeepSpeed": Versions((0, 19, 8), (0, 20)),
    "megatron.core": Versions((0, 16, 1), (0, 20)),
    "Megatron-LM": Versions((0, 17), (0, 20)),
    # Of these no version was tried: they need a GPU.
    "NVIDIA's apex": None,
    "Transformer Engine": None,
}
HOOKED = ("DeepSpeed", "Megatron-LM")
"""Those that are protected by hooks which the import of torch sets."""
PROXY_CUDA = 13
"""The device proxy opens this CUDA's libraries by name (csrc/proxy/libraries.cc)."""

NON_BLOCKING = "non-blocking communicators"
NCCL = {
    # Without them a communicator that is being made cannot be aborted.
    NON_BLOCKING: (2, 14),
    "shrink": (2, 27, 3),
    "revoke": (2, 28, 9),
    "grow": (2, 29, 2),
    # With NCCL_MULTI_RANK_GPU_ENABLE=1.
    "several ranks on a GPU": (2, 30),
}


def parse(version: str) -> tuple[int, ...]:
    """Return the numbers of a release: (2, 13, 0) of "2.13.0+cpu"; () of no version."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def is_early(version: str) -> bool:
    """Whether a version was made before its release: 2.14.0a0, 0.19.0rc1."""
    return re.search(r"\d\.?(a|b|rc|dev)\d*", version.partition("+")[0]) is not None


def dotted(version: tuple[int, ...]) -> str:
    """Write a version's numbers."""
    return ".".join(map(str, version))
