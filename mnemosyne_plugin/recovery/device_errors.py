"""What an error of a device asks for: which worker, on which device, may go on.

The codes are those of CUDA's driver_types.h. It says of which ones the process must be
relaunched; NVIDIA's catalogue of Xid errors, which a process does not get to see, says
which ones a new process does not mend.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mnemosyne_plugin.recovery.membership import Cure

_CODES: dict[int, tuple[Cure, str]] = {
    2: (Cure.USER, "out of memory"),
    3: (Cure.DEVICE, "the driver cannot be initialized"),
    46: (Cure.DEVICE, "the device is busy or unavailable"),
    100: (Cure.DEVICE, "no CUDA-capable device is detected"),
    214: (Cure.HARDWARE, "uncorrectable ECC error"),
    220: (Cure.HARDWARE, "uncorrectable NVLink error"),
    226: (Cure.PROCESS, "a contained exception"),
    700: (Cure.PROCESS, "illegal memory access"),
    702: (Cure.PROCESS, "a kernel took too long"),
    709: (Cure.PROCESS, "the context is destroyed"),
    710: (Cure.PROCESS, "device-side assert"),
    # "possibly due to stack corruption or exceeding the stack size limit"
    714: (Cure.PROCESS, "error in the call stack of a kernel"),
    715: (Cure.PROCESS, "illegal instruction"),
    716: (Cure.PROCESS, "misaligned address"),
    717: (Cure.PROCESS, "invalid address space"),
    718: (Cure.PROCESS, "invalid program counter"),
    719: (Cure.PROCESS, "launch failure"),
    721: (Cure.PROCESS, "tensor memory leak"),
    802: (Cure.DEVICE, "the system is not ready for CUDA"),
    806: (Cure.PROCESS, "the MPS server does not answer"),
    810: (Cure.PROCESS, "terminated by the MPS server"),
    911: (Cure.PROCESS, "error of an external device"),
    999: (Cure.PROCESS, "unknown error"),
}
# NCCL's words, and those of torch where it starts CUDA: no code comes with them.
_TEXT = re.compile(
    r"Cuda failure (\d+)|from cudaGetDeviceCount\(\).*Error (\d+):", re.S
)
_NO_DEVICE = 100, "No CUDA GPUs are available"


@dataclass(frozen=True, slots=True)
class DeviceError:
    """One that the device, and not the script's Python, has made."""

    cure: Cure
    text: str
    """In a line: the code, and what it means."""


def find(error: BaseException) -> DeviceError | None:
    """Return the device's error that this is, or has come from; None if there is none.

    Another error may be what a broken device has led to, as those of cuBLAS are, so the
    device is asked too; that does not wait for it.
    """
    for each in _chain(error):
        if isinstance(each, torch.OutOfMemoryError):
            return _of_code(2)
        found = _of_code(_code(each))
        if found is not None:
            return found
    try:
        look()
    except RuntimeError as sticky:
        return _of_code(_code(sticky))
    return None


def is_lasting(error: BaseException) -> bool:
    """Whether it comes back however often the same is tried on this device."""
    found = find(error)
    return found is not None and found.cure in (Cure.USER, Cure.DEVICE)


def look() -> None:
    """Raise the error of this thread's device, if it is one that stays."""
    if _is_in_use():
        torch.cuda.current_stream().query()


def name_device() -> str:
    """Return which one this process uses, in words, as far as it can be told."""
    try:
        index = torch.cuda.current_device() if _is_in_use() else -1
        found = torch.cuda.get_device_properties(index) if index >= 0 else None
    except RuntimeError:  # it does not even tell that any more
        found = None
    if found is None:
        return f"GPU of local rank {os.environ.get('LOCAL_RANK', '?')}"
    return f"GPU {index} ({found.name}, GPU-{found.uuid})"


def _is_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int:
    """Return the cudaError_t that an exception tells of, or 0."""
    if not isinstance(error, RuntimeError):
        return 0
    code = getattr(error, "error_code", None)  # of a torch.AcceleratorError
    if isinstance(code, int):
        return code
    text = str(error)
    if _NO_DEVICE[1] in text:
        return _NO_DEVICE[0]
    match = _TEXT.search(text)
    return int(match[1] or match[2]) if match else 0


def _of_code(code: int) -> DeviceError | None:
    if code not in _CODES:
        return None
    cure, words = _CODES[code]
    return DeviceError(cure, f"CUDA error {code}: {words}")
