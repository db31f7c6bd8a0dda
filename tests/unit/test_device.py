"""A lost device: who says it, who waits for it, and what cannot be mended."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mnemosyne_plugin.config import DeviceProxyConfig
from mnemosyne_plugin.errors import ConfigError, StaleEpoch
from mnemosyne_plugin.events import EventLog
from mnemosyne_plugin.proxy import DeviceProxy, elf, loaded, preload
from mnemosyne_plugin.recovery import device as recovery_device
from mnemosyne_plugin.recovery.device import Device
from mnemosyne_plugin.recovery.manager import Manager


class FakeProxy:
    """A client whose server does as it is told."""

    is_lost = False
    state = "healthy"
    error = 0
    waiting_s = 0.0
    timeout_s = 600.0
    kills = 0

    def communicator_error(self) -> int:
        return self.error

    def describe_loss(self) -> str:
        return "it fell off the bus"

    def recover(self, timeout_s: float) -> None:
        self.is_lost = False

    def kill(self) -> None:
        self.kills += 1


class FakeMesh:
    """A mesh that only knows whether it was fenced."""

    epoch = 3
    fenced: StaleEpoch | None = None

    def failure(self) -> StaleEpoch | None:
        return self.fenced

    def fence(self, reason: str) -> None:
        self.fenced = StaleEpoch(reason)


@pytest.fixture
def made() -> tuple[Device, Any, Any]:
    proxy: Any = FakeProxy()
    mesh: Any = FakeMesh()
    return Device(proxy, mesh, 1, EventLog(None, "test")), proxy, mesh


def test_a_healthy_device_fences_nothing(made: Any) -> None:
    device, _, mesh = made
    device.wait()
    assert mesh.fenced is None
    assert device.take_news() is None
    assert not device.recover()


def test_torch_does_not_try_cudnn_for_attention_under_the_proxy(made: Any) -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("error", [0, 719])  # the state may come later than an answer
def test_a_lost_device_fences_and_is_news_once(made: Any, error: int) -> None:
    device, proxy, mesh = made
    proxy.is_lost, proxy.error = error == 0, error
    device.look()
    assert "rank 1 lost its device: it fell off the bus" in str(mesh.fenced)
    assert device.take_news() == "it fell off the bus"
    assert device.take_news() is None


def test_a_failed_communicator_is_no_loss_of_the_device(made: Any) -> None:
    device, proxy, mesh = made
    proxy.error = 6
    device.look()
    assert "NCCL error 6" in str(mesh.fenced)
    assert device.take_news() is None
    assert not device.recover()
    assert not device.is_empty


def test_a_recovered_device_is_empty(made: Any) -> None:
    device, proxy, _ = made
    proxy.is_lost = True
    assert device.recover()
    assert device.is_empty


def test_a_device_that_hangs_is_ended_but_not_one_that_waits_for_others(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, proxy, mesh = made
    now = 1000.0
    monkeypatch.setattr(recovery_device.time, "monotonic", lambda: now)
    proxy.waiting_s = 599.0
    assert device.watch(is_latched=False) == pytest.approx(1)
    assert mesh.fenced is None
    proxy.waiting_s = 600.0
    device.watch(is_latched=False)
    assert "has waited 600 s for its device" in str(mesh.fenced)
    # From the failure on there is a time of grace: aborted waits end in it.
    device.watch(is_latched=True)
    now += 9
    assert device.watch(is_latched=True) == pytest.approx(1)
    assert proxy.kills == 0
    now += 1
    device.watch(is_latched=True)
    assert proxy.kills == 1
    proxy.waiting_s = 0.0
    now += 60
    device.watch(is_latched=True)
    assert proxy.kills == 1


def test_a_device_that_starts_again_is_given_the_time_for_it(made: Any) -> None:
    device, proxy, _ = made
    proxy.state, proxy.waiting_s = "restoring", 60.0
    device.watch(is_latched=True)
    device._latched_at -= 60
    device.watch(is_latched=True)
    assert proxy.kills == 0
    device._latched_at -= 60
    proxy.waiting_s = 120.0
    device.watch(is_latched=True)
    assert proxy.kills == 1


def test_what_the_launcher_preloads_comes_before_what_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded() is None
    names = preload({"LD_PRELOAD": "/lib/theirs.so"})["LD_PRELOAD"].split(":")
    assert [Path(name).name for name in names] == [
        *("libmnemosyne_client.so", "libcuda.so.1", "theirs.so")
    ]
    assert preload({}, 9)["MNEMOSYNE_DEVICE_TIMEOUT_S"] == "9"
    monkeypatch.setattr("mnemosyne_plugin.proxy._FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="was not built"):
        preload({})


def test_the_names_that_a_library_takes_and_gives(tmp_path: Path) -> None:
    folder = Path(DeviceProxy.__module__.replace(".", "/"))
    library = Path(__file__).parents[2] / folder / "lib" / "libmnemosyne_client.so"
    names = elf.dynamic_names(library)
    assert {"cudaMalloc", "mnemosyne_proxy_state", "memcpy"} <= names
    assert elf.dynamic_names(Path(__file__)) == set()
    torn = tmp_path / "torn.so"
    torn.write_bytes(library.read_bytes()[:4096])
    assert elf.dynamic_names(torn) == set()
    assert sys.executable  # nothing of this was loaded


@pytest.mark.parametrize("is_under_proxy", [False, True])
def test_what_a_config_says_of_the_proxy_is_never_left_undone(
    is_under_proxy: bool, made: tuple[Device, Any, Any]
) -> None:
    manager = object.__new__(Manager)
    manager._device = made[0] if is_under_proxy else None
    manager.configure_device_proxy(None)
    manager.configure_device_proxy(DeviceProxyConfig(enabled=is_under_proxy))
    with pytest.raises(ConfigError, match="--device-proxy"):
        manager.configure_device_proxy(DeviceProxyConfig(enabled=not is_under_proxy))


def test_a_timeout_of_the_command_line_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = object.__new__(DeviceProxy)
    proxy.timeout_s = 600.0
    proxy.propose_timeout(7)
    assert proxy.timeout_s == 7
    monkeypatch.setenv("MNEMOSYNE_DEVICE_TIMEOUT_S", "9")
    proxy.propose_timeout(8)
    assert proxy.timeout_s == 7
