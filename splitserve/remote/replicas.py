"""The replicas behind a name: a channel to each, which of them are ready, and which one gets the next call.

gRPC balances calls over connections, does not know which replica is idle, and cannot keep a stream open to each. So the name is
resolved here, every few seconds, and each address gets a channel of its own. Knows channels, no inference.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import chain
from typing import Any, Generic, TypeVar

import grpc

from splitserve.errors import Unavailable
from splitserve.remote.stream import ALONE

RESOLVE_INTERVAL_S = 2.0
"""How often a name is resolved: a new replica gets calls after about that time."""

WAIT_FOR_REPLICA_S = 1.0
"""How long a call waits for a replica if none is ready: long enough for the restart of a single one, short in an outage."""

AVOID_S = 1.0
"""How long a replica that failed gets calls only if all others failed, too."""

REACH_INTERVAL_S = 0.1
"""Interval of attempts to connect to every process of an address, until all are connected."""

MAX_REACH_TRIES = 50
"""After this number of attempts the next ones follow the next name resolution: a process may be down."""

RETIRE_TIMEOUT_S = 60.0
"""How long calls in flight to a replica that the name no longer has may take."""

_DNS_TARGET = re.compile(r"(?:dns:///)?(?P<host>[^/\[\]]+|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]+)")

Resolve = Callable[[str, int], Awaitable[list[str]]]

READY = grpc.ChannelConnectivity.READY


class Replica:
    """One address: its channel, its state and its calls in flight."""

    def __init__(self, target: str, channel: grpc.aio.Channel, on_change: Callable[[], None]) -> None:
        self.target = target
        self.channel = channel
        self.state = channel.get_state(try_to_connect=True)
        self.n_in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.avoided_until = 0.0
        self._on_change = on_change
        self._watching = asyncio.create_task(self._watch())

    @property
    def worker(self) -> tuple[int, int] | None:
        """Index and count of the process, among those that share the address; None if unknown."""
        return None

    def call_started(self) -> None:
        """Count a call in flight."""
        self.n_in_flight += 1
        self.idle.clear()

    def call_ended(self) -> None:
        """Count a call that has ended, however it did."""
        self.n_in_flight -= 1
        if not self.n_in_flight:
            self.idle.set()

    async def _watch(self) -> None:
        while True:
            await self.channel.wait_for_state_change(self.state)
            self.state = self.channel.get_state(try_to_connect=True)
            self._on_change()

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self.channel.close()


R = TypeVar("R", bound=Replica)


class Replicas(Generic[R]):
    """The replicas of a target, which is resolved repeatedly between `start` and `close`.

    Args:
        target: ``host:port`` or ``dns:///host:port`` for all addresses of a name; any other gRPC name (``unix:…``,
            ``xds:///…``) is a single replica, balanced by gRPC.
        stage: of the peer, for errors.
        connect: makes a replica from the gRPC name of an address, its authority, and a callback for state changes.
        is_stale: whether open channels must be replaced; called whenever the name is resolved.
        resolve: gRPC names of the addresses of a host and port; may raise OSError.
        resolve_interval_s: how often the name is resolved.
        wait_s: how long `pick` waits for a replica.
    """

    def __init__(
        self,
        target: str,
        *,
        stage: str,
        connect: Callable[[str, str, Callable[[], None]], R],
        is_stale: Callable[[], bool] = lambda: False,
        resolve: Resolve | None = None,
        resolve_interval_s: float = RESOLVE_INTERVAL_S,
        wait_s: float = WAIT_FOR_REPLICA_S,
    ) -> None:
        self._target = target
        self._stage = stage
        self._connect = connect
        self._is_stale = is_stale
        self._resolve = resolve or resolve_addresses
        self._resolve_interval_s = resolve_interval_s
        self._wait_s = wait_s
        self._replicas: dict[str, R] = {}
        self._worker_channels: dict[str, list[R]] = {}
        """Further channels to an address, one for each other process that shares it."""
        self._authorities: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._resolving: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._match = _DNS_TARGET.fullmatch(target)

    async def start(self) -> None:
        """Resolve the name, now and repeatedly."""
        await self._refresh()
        self._resolving = asyncio.create_task(self._keep_resolving())

    async def close(self) -> None:
        if self._resolving is not None:
            self._resolving.cancel()
        await asyncio.gather(*(replica.close() for replica in self._all()), *self._closing)

    def _all(self) -> Iterable[R]:
        return (
            chain(self._replicas.values(), *self._worker_channels.values()) if self._worker_channels else self._replicas.values()
        )

    @property
    def n_channels(self) -> int:
        """Replicas, usable or not."""
        return sum(1 for _ in self._all())

    def usable(self) -> list[R]:
        """Those that accept calls at present."""
        return [replica for replica in self._all() if replica.state is READY]

    def targets(self) -> list[tuple[str, str]]:
        """The addresses behind the name, ready or not, each with the authority that it belongs to."""
        return list(self._authorities.items())

    async def pick(self, *, but: Iterable[R] = (), wait_s: float | None = None, suits: Callable[[R], bool] | None = None) -> R:
        """The replica for the next call: of the usable ones that with the fewest calls in flight, round robin among equals.

        Args:
            but: those that were tried already, taken only if there is no other.
            wait_s: how long to wait if none is ready.
            suits: whether a replica is known to have the requested version; others are picked only if none does.

        Raises:
            Unavailable: none is ready.
        """
        if (found := self._best(but, suits)) is not None:
            return found
        wait_s = self._wait_s if wait_s is None else min(wait_s, self._wait_s)
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
            if (found := self._best(but, suits)) is not None:
                return found
        raise Unavailable(f"the {self._stage} service cannot be reached", stage=self._stage)

    def _best(self, but: Iterable[R], suits: Callable[[R], bool] | None) -> R | None:
        usable = self.usable()
        if len(usable) < 2:
            return usable[0] if usable else None
        now = time.monotonic()
        self._turn += 1
        if suits is not None:
            usable = [replica for replica in usable if suits(replica)] or usable
        fresh = [replica for replica in usable if replica not in but] or usable
        preferred = [replica for replica in fresh if replica.avoided_until <= now] or fresh
        return min(
            (preferred[(self._turn + index) % len(preferred)] for index in range(len(preferred))),
            key=lambda each: each.n_in_flight,
        )

    def avoid(self, replica: R) -> None:
        """Prefer others for a while: it failed or is slow."""
        replica.avoided_until = time.monotonic() + AVOID_S

    async def _keep_resolving(self) -> None:
        n_tries = 0
        while True:
            is_reaching = self._reach_workers() and n_tries < MAX_REACH_TRIES
            n_tries = n_tries + 1 if is_reaching else 0
            await asyncio.sleep(min(REACH_INTERVAL_S, self._resolve_interval_s) if is_reaching else self._resolve_interval_s)
            if not is_reaching:
                await self._refresh()

    async def _refresh(self) -> None:
        if self._match is None:
            self._update({self._target: ""})
            return
        try:
            found = await self._resolve(self._match["host"].strip("[]"), int(self._match["port"]))
        except OSError:
            return  # keep what is known: the name service may be down for a while
        self._update(dict.fromkeys(found, self._target.removeprefix("dns:///")))

    def _update(self, targets: dict[str, str]) -> None:
        for target in list(self._replicas) if self._is_stale() else self._replicas.keys() - targets.keys():
            for replica in (self._replicas.pop(target), *self._worker_channels.pop(target, ())):
                self._start_retiring(replica)
        self._authorities = targets
        for target, authority in targets.items():
            if target not in self._replicas:
                self._replicas[target] = self._connect(target, authority, self._changed.set)
        self._changed.set()

    def _reach_workers(self) -> bool:
        """Connect to every process where several share an address. Whether some are not connected yet.

        The kernel decides which process gets a connection: connections are opened until all are reached, and those that reach a
        process a second time are closed.
        """
        is_missing = False
        for target, first in self._replicas.items():
            _, count = first.worker or ALONE
            if count == 1:
                continue
            reached, kept, n_unknown = set(), [], 0
            for replica in (first, *self._worker_channels.get(target, ())):
                if replica.worker is None:
                    n_unknown += 1
                elif replica.worker in reached:
                    self._start_retiring(replica)
                    continue
                else:
                    reached.add(replica.worker)
                kept.append(replica)
            n_missing = count - len(reached)
            kept += [self._connect(target, self._authorities[target], self._changed.set) for _ in range(n_missing - n_unknown)]
            self._worker_channels[target] = kept[1:]
            is_missing |= n_missing > 0
        return is_missing

    def _start_retiring(self, replica: R) -> None:
        task = asyncio.create_task(self._retire(replica))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _retire(self, replica: R) -> None:
        """Close a replica that the name no longer has, after its calls in flight."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(replica.idle.wait(), RETIRE_TIMEOUT_S)
        await replica.close()


async def resolve_addresses(host: str, port: int) -> list[str]:
    """Resolve a host to the gRPC names of its addresses.

    Raises:
        OSError: the name is unknown, or the name service is unreachable.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [_address(family, sockaddr) for family, *_, sockaddr in found]


def _address(family: int, sockaddr: tuple[Any, ...]) -> str:
    """The gRPC name of an address."""
    if family == socket.AF_INET6:
        return f"ipv6:[{sockaddr[0]}]:{sockaddr[1]}"
    return f"ipv4:{sockaddr[0]}:{sockaddr[1]}"
