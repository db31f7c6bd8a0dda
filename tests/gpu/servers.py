"""How the programs of this folder end a server of the device proxy."""

import time

from mnemosyne_plugin.proxy import DeviceProxy

PATIENCE_S = 30


def wait_until_lost(device: DeviceProxy) -> None:
    """Wait until the client says that the device is lost."""
    deadline = time.monotonic() + PATIENCE_S
    while not device.is_lost:
        assert time.monotonic() < deadline, "the server does not end"
        time.sleep(0.0002)


def end_server(device: DeviceProxy) -> None:
    """End it, and wait for its end."""
    device.kill()
    wait_until_lost(device)
