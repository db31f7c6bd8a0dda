"""What the agents of a job share: a c10d store with two logs, and who they are.

The store is a TCPStore that the leader hosts: the one that workers find under
MASTER_ADDR and MASTER_PORT, so that it lives exactly as long as the leader. The
user's rendezvous (static, c10d, etcd) only serves to find it.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]
    DistStoreError,
    PrefixStore,
    Store,
    TCPStore,
)
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo

from mnemosyne_plugin.errors import MnemosyneError

STORE_TIMEOUT = timedelta(seconds=60)
"""For one request; and at start for the other agents, which have met already."""

_FOLLOW_TIMEOUT = timedelta(hours=1)
_PREFIX = "mnemosyne"


class StoreLost(MnemosyneError):
    """The store, and so the leader that hosts it, is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentInfo:
    """What an agent tells the others at start."""

    num_ranks: int
    role: str
    host: str
    """An address of this node that reaches the leader, or is reached by it."""
    run_dir: str
    """Host name and path of its run directory."""


class Board:
    """The store, as agents use it. All agents made the same one by ``join``."""

    def __init__(self, host: str, port: int, agent: int, num_agents: int) -> None:
        self.host = host
        self.port = port
        self.agent = agent
        self.num_agents = num_agents
        self.infos: tuple[AgentInfo, ...] = ()
        self.secret = ""
        self._store = self._connect(STORE_TIMEOUT)
        self._servers: list[TCPStore] = []

    @property
    def is_leader(self) -> bool:
        """Whether this agent decides."""
        return self.agent == 0

    @property
    def first_rank(self) -> int:
        """The rank of this agent's local rank 0."""
        return sum(info.num_ranks for info in self.infos[: self.agent])

    def bind_host(self) -> str:
        """Return the address of this node where its workers listen."""
        own = self.infos[self.agent].host
        others = [info.host for info in self.infos if not _is_loopback(info.host)]
        return _route_to(others[0], self.port) if _is_loopback(own) and others else own

    def exchange(self, info: AgentInfo) -> None:
        """Learn who the agents are, and the secret of the job. Collective."""
        self._put(f"agent/{self.agent}", asdict(info))
        self.beat(0)
        if self.is_leader:
            self._put("secret", secrets.token_hex(32))
        others = [self.get(f"agent/{i}") for i in range(self.num_agents)]
        self.infos = tuple(AgentInfo(**other) for other in others)
        self.secret = self.get("secret")

    def get(self, key: str) -> Any:
        """Return the JSON value of ``key``; waits for it."""
        return json.loads(_guard(lambda: self._store.get(key)))

    def append(self, log: str, value: dict[str, Any]) -> None:
        """Append one entry to a log that all agents share."""
        number = _guard(lambda: self._store.add(f"{log}/count", 1))
        self._put(f"{log}/{number}", value)

    def follow(
        self, log: str, deliver: Callable[[dict[str, Any] | None], None]
    ) -> None:
        """Have a thread deliver each entry, in order, and None if the store is lost."""

        def read() -> None:
            number = 1
            try:
                store = self._connect(_FOLLOW_TIMEOUT)
                while True:
                    try:
                        entry = json.loads(store.get(f"{log}/{number}"))
                    except DistStoreError:  # nothing new for an hour
                        continue
                    number += 1
                    deliver(entry)
            except RuntimeError:
                deliver(None)

        threading.Thread(target=read, name=f"follow-{log}", daemon=True).start()

    def beat(self, count: int) -> None:
        """Show that this agent lives."""
        self._put(f"beat/{self.agent}", count)

    def beats(self) -> list[int]:
        """Return the last beat of each agent."""
        keys = [f"beat/{agent}" for agent in range(self.num_agents)]
        return [
            json.loads(item) for item in _guard(lambda: self._store.multi_get(keys))
        ]

    def host_worker_store(self, attempt: int) -> None:
        """Host a fresh store for the workers of a restarted job. Leader only.

        The keys of the attempt before would confuse their init_process_group.
        """
        server = TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
        self._servers.append(server)
        self._put(f"store/{attempt}", server.port)

    def worker_port(self, attempt: int) -> int:
        """Return MASTER_PORT of the workers of this attempt."""
        return self.port if attempt == 0 else int(self.get(f"store/{attempt}"))

    def leave(self) -> None:
        """Say that this agent and its workers do not need the store any more."""
        self._put(f"left/{self.agent}", True)

    def wait_for_others(self, lost: Collection[int], timeout_s: float) -> bool:
        """Wait until all agents but the lost ones left; False if not in time."""
        agents = set(range(self.num_agents)).difference(lost)
        keys = [f"left/{agent}" for agent in agents]
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError:
            return False
        return True

    def _put(self, key: str, value: Any) -> None:
        _guard(lambda: self._store.set(key, json.dumps(value)))

    def _connect(self, timeout: timedelta) -> Store:
        client = TCPStore(
            self.host,
            self.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timeout,
        )
        return PrefixStore(_PREFIX, client)


def _guard(request: Callable[[], Any]) -> Any:
    try:
        return request()
    except RuntimeError as error:
        raise StoreLost(f"the leader's store does not answer: {error}") from error


@dataclass(frozen=True, slots=True)
class Party:
    """The outcome of a rendezvous. ``keep`` owns a store that must stay alive."""

    board: Board
    keep: RendezvousInfo | TCPStore


def join(
    handler: RendezvousHandler,
    *,
    num_ranks: int,
    role: str,
    run_dir: str,
    local_addr: str | None,
) -> Party:
    """Meet the other agents by the user's rendezvous. Blocks until all are there."""
    party = _meet(handler)
    board = party.board
    board.exchange(
        AgentInfo(
            num_ranks=num_ranks,
            role=role,
            host=local_addr or _route_to(board.host, board.port),
            run_dir=f"{socket.gethostname()}:{os.path.realpath(run_dir)}",
        )
    )
    return party


def _meet(handler: RendezvousHandler) -> Party:
    info = handler.next_rendezvous()
    key = f"{_PREFIX}/leader"
    keep: RendezvousInfo | TCPStore = info
    if info.rank == 0:
        address = info.bootstrap_store_info
        assert address is not None
        host, port = address.master_addr, int(address.master_port)
        if not handler.use_agent_store:  # it only proposes a port; nobody listens
            keep = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = keep.port
        info.store.set(key, json.dumps([host, port]))
    host, port = json.loads(info.store.get(key))
    return Party(Board(host, port, info.rank, info.world_size), keep)


def _route_to(host: str, port: int) -> str:
    """Return the address of this node from which ``host`` is reached."""
    family, kind, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: sends nothing
        return str(probe.getsockname()[0])


def _is_loopback(host: str) -> bool:
    """Whether only this node can use this address."""
    return host.startswith("127.") or host == "::1"
