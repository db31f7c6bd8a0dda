"""Transfer of state between ranks, over an endpoint made of queues."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from mnemosyne_plugin.errors import StateMismatch
from mnemosyne_plugin.state import checksum
from mnemosyne_plugin.state.manifest import Entry
from mnemosyne_plugin.state.mirror import Mirrors, capacity_for
from mnemosyne_plugin.state.torch_state import (
    Buffers,
    Tensors,
    allocate_optimizer,
    check_manifest,
    load_optimizer_scalars,
    module_tensors,
    optimizer_scalars,
    optimizer_tensors,
)
from mnemosyne_plugin.state.transfer import receive_state, send_state
from wire import Port, Wire

STRIPE_TAG = 102
Parts = Sequence[tuple[torch.Tensor, int]]


class Toy:
    """A model with an optimizer; ``width`` lets a test build another structure."""

    def __init__(self, seed: int, width: int = 7, steps: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, width), torch.nn.BatchNorm1d(width)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1 + seed)
        for _ in range(steps):
            self.model(torch.randn(4, 5)).square().sum().backward()
            self.optimizer.step()

    def tensors(self) -> Tensors:
        return module_tensors(self.model) | optimizer_tensors(self.optimizer)

    def allocate(self, manifest: Sequence[Entry]) -> Tensors:
        allocate_optimizer(self.optimizer, manifest)
        tensors = self.tensors()
        check_manifest(tensors, manifest)
        return {entry.key: tensors[entry.key] for entry in manifest}

    def rewind(self) -> None:
        pass

    def local(self) -> Any:
        return None

    def load_local(self, local: Any) -> None:
        pass

    def scalars(self) -> dict[str, Any]:
        return optimizer_scalars(self.optimizer)

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        load_optimizer_scalars(self.optimizer, scalars)


class HostCarrier:
    """Carries what is said to lie on devices of that type, over a wire of its own."""

    def __init__(self, port: Port, device_type: str) -> None:
        self.device_type = device_type
        self.carried_bytes = 0
        self._port = port

    def move(self, outgoing: Parts, incoming: Parts) -> None:
        for tensor, rank in outgoing:
            self._port.send([tensor], rank, 0)
        for tensor, rank in incoming:
            self._port.recv([tensor], rank, 0).wait()
            self.carried_bytes += tensor.nbytes


def transfer(
    source: Toy, newcomer: Toy, wire: Wire, carriers: Sequence[HostCarrier | None] = ()
) -> int:
    sources, carriers = (0, 1, 3), carriers or [None] * 4
    for rank in sources:
        send_state(
            Port(wire, rank),
            source,
            rank=rank,
            sources=sources,
            newcomer=2,
            carrier=carriers[rank],
        )
    return receive_state(Port(wire, 2), newcomer, sources=sources, carrier=carriers[2])


def test_a_newcomer_becomes_bit_identical_to_its_replicas() -> None:
    source, newcomer = Toy(1, steps=3), Toy(2)
    size = transfer(source, newcomer, Wire())
    theirs, ours = source.tensors(), newcomer.tensors()
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
    assert size == sum(t.numel() * t.element_size() for t in theirs.values())
    assert newcomer.optimizer.param_groups[0]["lr"] == 1.1


@pytest.mark.parametrize("device_type, is_carried", [("cpu", True), ("cuda", False)])
def test_what_lies_on_devices_takes_the_carrier(
    device_type: str, is_carried: bool
) -> None:
    source, newcomer = Toy(1, steps=3), Toy(2)
    wire = Wire(corrupt=STRIPE_TAG) if is_carried else Wire()  # nothing goes that way
    other = Wire()
    carriers = [HostCarrier(Port(other, rank), device_type) for rank in range(4)]
    size = transfer(source, newcomer, wire, carriers)
    assert carriers[2].carried_bytes == (size if is_carried else 0)
    ours = newcomer.tensors()
    assert all(torch.equal(each, ours[key]) for key, each in source.tensors().items())


def test_a_flipped_bit_fails_the_checksum() -> None:
    with pytest.raises(StateMismatch, match="checksum"):
        transfer(Toy(1, steps=1), Toy(2), Wire(corrupt=STRIPE_TAG))
    wire = Wire(corrupt=0)
    carriers = [HostCarrier(Port(wire, rank), "cpu") for rank in range(4)]
    with pytest.raises(StateMismatch, match="checksum"):
        transfer(Toy(1, steps=1), Toy(2), Wire(), carriers)


class OnDevice(torch.Tensor):
    """Host memory that says it is not."""

    is_cpu = False  # type: ignore[assignment]


def test_a_devices_checksum_tells_each_changed_byte_and_each_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checksum, "_BLOCK_BYTES", 64)
    data = torch.randint(1, 255, (203,), dtype=torch.uint8)

    def value(*cuts: int, data: torch.Tensor = data) -> int:
        parts = data.tensor_split(torch.tensor(cuts, dtype=torch.int64))
        return checksum.checksum(part.as_subclass(OnDevice) for part in parts)

    right = value()
    for place in range(len(data)):
        other = data.clone()
        other[place] += 1
        assert value(data=other) != right
    words = data[:200].view(torch.int64).clone()
    words[[3, 5]] = words[[5, 3]]
    assert value(data=torch.cat([words.view(torch.uint8), data[200:]])) != right
    # Signs, in which words differ by half of what an int64 holds.
    numbers = torch.zeros(16)
    numbers[1], numbers[9] = 1.0, -1.0

    def of(numbers: torch.Tensor) -> int:
        return value(data=numbers.view(torch.uint8))

    exchanged = numbers.clone()
    exchanged[[1, 9]] = numbers[[9, 1]]
    assert len({of(numbers), of(-numbers), of(exchanged)}) == 3
    doubles = torch.randn(8, dtype=torch.float64)
    assert of(doubles) != of(-doubles)
    # Where the bytes lie is not part of it.
    assert value(data=torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]) == right
    assert value(5, 11, 40) == value(5, 11, 40, data=data.clone())


def test_a_newcomer_of_another_structure_is_refused_by_key() -> None:
    with pytest.raises(StateMismatch) as caught:
        transfer(Toy(1, steps=1), Toy(2, width=8), Wire())
    assert caught.value.key == "parameter/0.weight"


def test_buddies_hold_the_packs_of_the_last_two_versions() -> None:
    wire = Wire()
    ranks = [Mirrors([1 - rank], [1 - rank]) for rank in range(2)]
    for rank, mirrors in enumerate(ranks):
        mirrors.connect(Port(wire, rank), Port(wire, rank), capacity_for(100))
    for version in (1, 2, 3):
        for rank, mirrors in enumerate(ranks):
            mirrors.remember(version, f"after {version} of {rank}".encode())
        threads = [threading.Thread(target=m.exchange, args=(version,)) for m in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    ranks[0].send_begin(3, b"begin 3 of 0")
    ranks[1].collect()
    assert ranks[1].held() == {0: (2, 3)}
    assert ranks[1].packs_of(0, 3) == (b"after 3 of 0", b"begin 3 of 0")
    assert ranks[1].packs_of(0, 2) == (b"after 2 of 0", b"")


def test_local_state_that_outgrows_its_message_is_an_error() -> None:
    mirrors = Mirrors([1], [])
    mirrors.connect(Port(Wire(), 0), Port(Wire(), 0), capacity_for(10))
    with pytest.raises(StateMismatch):
        mirrors.send_begin(1, bytes(5000))


def test_buffers_come_back_as_they_were_before_the_step() -> None:
    toy = Toy(1)
    buffers = Buffers(toy.model)
    buffers.begin()
    before = {k: v.clone() for k, v in toy.model.named_buffers()}
    toy.model(torch.randn(4, 5))
    assert not torch.equal(before["1.running_mean"], toy.model[1].running_mean)
    assert buffers.local().keys() == before.keys()
    buffers.rewind()
    for key, value in toy.model.named_buffers():
        assert torch.equal(before[key], value), key


def test_a_newcomer_takes_the_buffers_of_the_lost_worker_not_of_a_replica() -> None:
    lost, newcomer = Toy(1), Toy(2)
    buffers = Buffers(lost.model)
    buffers.begin()
    lost.model(torch.randn(4, 5))
    Buffers(newcomer.model).load_local(buffers.local())
    for theirs, ours in zip(
        lost.model.buffers(), newcomer.model.buffers(), strict=True
    ):
        assert torch.equal(theirs, ours)
