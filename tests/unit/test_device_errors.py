"""Whose error it is that a script has ended with."""

from typing import Any

import pytest
import torch

from mnemosyne_plugin.recovery import device_errors
from mnemosyne_plugin.recovery.membership import Cure


def accelerator_error(code: int) -> RuntimeError:
    error: Any = torch.AcceleratorError("CUDA error: of some kind")
    error.error_code = code
    return error  # type: ignore[no-any-return]


def cure(error: BaseException) -> Cure:
    found = device_errors.find(error)
    return found.cure if found else Cure.NONE


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (1, Cure.NONE),  # an invalid argument
        (2, Cure.USER),
        (46, Cure.DEVICE),
        (101, Cure.NONE),  # an invalid ordinal
        (214, Cure.HARDWARE),
        (700, Cure.PROCESS),
        (710, Cure.PROCESS),
        (719, Cure.PROCESS),
        (801, Cure.NONE),  # not supported
        (900, Cure.NONE),  # in a capture
    ],
)
def test_the_code_tells_what_helps(code: int, wanted: Cure) -> None:
    assert cure(accelerator_error(code)) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("NCCL error: Cuda failure 700 'an illegal memory access'", Cure.PROCESS),
        ("No CUDA GPUs are available", Cure.DEVICE),
        (
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda "
            "functions before? Error 802: system not yet initialized",
            Cure.DEVICE,
        ),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling f()", Cure.NONE),
    ],
)
def test_so_does_a_text_without_a_code(text: str, wanted: Cure) -> None:
    assert cure(RuntimeError(text)) is wanted
    assert cure(ValueError(text)) is Cure.NONE


def test_what_a_broken_device_has_led_to_is_its_error() -> None:
    try:
        try:
            raise accelerator_error(700)
        finally:
            raise KeyError("of a cleanup")
    except KeyError as error:
        assert cure(error) is Cure.PROCESS
    assert cure(torch.OutOfMemoryError("CUDA out of memory")) is Cure.USER


def test_a_broken_device_is_asked_where_the_error_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream:
        def query(self) -> bool:
            raise accelerator_error(716)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert cure(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")) is Cure.PROCESS
