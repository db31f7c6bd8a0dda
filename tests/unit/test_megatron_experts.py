"""What a mixture of experts keeps in itself, in a step that is made again."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnemosyne_plugin.adapters.megatron import experts
from mnemosyne_plugin.adapters.megatron.experts import Sums


class OldTable:
    """Up to 0.17: a dictionary of dictionaries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._entries: dict[str, Any] = {}
        utils = SimpleNamespace(get_moe_layer_wise_logging_tracker=self._get)
        monkeypatch.setitem(sys.modules, experts._MOE + "moe_utils", utils)
        monkeypatch.delitem(sys.modules, experts._MOE + "moe_logging", raising=False)

    def _get(self) -> dict[str, Any]:
        return self._entries

    def add(self, name: str, loss: float) -> None:
        self._entries.setdefault(name, {"values": torch.zeros(2)})["values"][1] += loss

    def values(self) -> dict[str, list[float]]:
        return {name: entry["values"].tolist() for name, entry in self._entries.items()}


class NewTable:
    """From 0.18 on: an object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.metrics: dict[str, Any] = {}
        logging = SimpleNamespace(get_moe_metrics_tracker=lambda: self)
        monkeypatch.setitem(sys.modules, experts._MOE + "moe_logging", logging)

    def ensure_initialized(self, name: str, num_layers: int, device: Any) -> None:
        entry = SimpleNamespace(values=torch.zeros(num_layers, device=device))
        self.metrics.setdefault(name, entry)

    def add(self, name: str, loss: float) -> None:
        self.ensure_initialized(name, 2, None)
        self.metrics[name].values[1] += loss

    def values(self) -> dict[str, list[float]]:
        return {name: entry.values.tolist() for name, entry in self.metrics.items()}


@pytest.mark.parametrize("kind", [OldTable, NewTable])
def test_a_step_that_is_made_again_adds_its_losses_once(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = kind(monkeypatch)
    table.add("aux", 1.0)
    before = Sums.capture()
    assert before == Sums.capture()
    table.add("aux", 2.0)
    table.add("z", 4.0)
    assert before != Sums.capture()

    before.restore()

    assert table.values() == {"aux": [0.0, 1.0], "z": [0.0, 0.0]}


@pytest.mark.parametrize("kind", [OldTable, NewTable])
def test_a_newcomer_takes_the_sums_over(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind(monkeypatch).add("aux", 1.0)
    sums, newcomer = Sums.capture(), kind(monkeypatch)

    sums.restore()
    newcomer.add("aux", 2.0)

    assert newcomer.values() == {"aux": [0.0, 3.0]}


def test_an_unwound_forward_leaves_nothing_in_a_shared_expert() -> None:
    shared = torch.nn.Module()
    for name in experts._HANDED_ON:
        setattr(shared, name, None)
    shared.cached_output = torch.ones(1)

    experts.drop(torch.nn.ModuleList([shared]))

    assert shared.cached_output is None
