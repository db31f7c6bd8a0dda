"""What torch.distributed is asked for in a script's place."""

from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import constants

from mnemosyne_plugin.ccl.intercept import _with_our_backend


class Asked:
    """Stands in for torch's functions, and keeps the arguments."""

    def __init__(self) -> None:
        def init_process_group(
            backend: Any = None, init_method: Any = None, timeout: Any = None
        ) -> None:
            self.got = backend, timeout

        def new_group(
            ranks: Any = None, timeout: Any = None, backend: Any = None
        ) -> None:
            self.got = backend, timeout

        world: list[str | None] = []
        self.init = _with_our_backend(init_process_group, True, world)
        self.new = _with_our_backend(new_group, True, world)

    def of_init(self, *args: Any, **kwargs: Any) -> Any:
        self.init(*args, **kwargs)
        return self.got

    def of_new(self, *args: Any, **kwargs: Any) -> Any:
        self.new(*args, **kwargs)
        return self.got


def test_groups_have_the_timeout_of_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nccls, own = timedelta(seconds=600), timedelta(seconds=7)
    monkeypatch.setattr(constants, "default_pg_nccl_timeout", nccls)
    asked = Asked()
    assert asked.of_init("nccl") == ("mnemosyne", nccls)
    assert asked.of_init("nccl", None, own) == ("mnemosyne", own)
    assert asked.of_new([0, 1]) == (None, nccls)
    assert asked.of_new([0, 1], own) == (None, own)
    assert asked.of_new(backend="gloo") == ("mnemosyne", None)
    assert asked.of_init(backend="cpu:gloo,cuda:nccl") == ("mnemosyne", None)
    assert asked.of_new([0, 1]) == (None, None)
    assert asked.of_new([0, 1], None, "NCCL") == ("mnemosyne", nccls)
    assert asked.of_init() == ("mnemosyne", None)
