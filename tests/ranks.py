"""Several ranks of a program, which meet on this machine without a launcher."""

import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def on_each_rank(num_ranks: int, run: Callable[[Mapping[str, str]], T]) -> list[T]:
    """Call ``run`` for all ranks at once, with torchrun's variables for each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    meeting = {
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with ThreadPoolExecutor() as pool:
        ranks = ({**meeting, "RANK": str(rank)} for rank in range(num_ranks))
        return list(pool.map(run, ranks))
