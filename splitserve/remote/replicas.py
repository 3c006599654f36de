"""The replicas behind a name: a channel to each, which ones can be used now, and which one gets the next call.

gRPC balances calls over connections; it does not know which replica is idle, and cannot keep a stream open to each. So a name is
resolved here, every few seconds, and each address gets a channel of its own. Knows channels, and nothing of inference.
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
"""How often a name is looked up again: a new replica gets calls after about that time."""

PATIENCE_S = 1.0
"""How long a call waits for a replica when none can be used: a restart of the only one is bridged, an outage is told."""

LEFT_OUT_S = 1.0
"""For how long a replica that failed is only used if there is no other."""

REACH_INTERVAL_S = 0.1
"""How often channels to further processes of an address are looked at, until all are reached."""

MAX_REACH_TRIES = 50
"""After so many the next ones are made with the next look at the name: a process may be away."""

RETIRE_TIMEOUT_S = 60.0
"""How long calls under way to a replica that is gone from the name may take."""

_DNS_TARGET = re.compile(r"(?:dns:///)?(?P<host>[^/\[\]]+|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]+)")

Resolve = Callable[[str, int], Awaitable[list[str]]]

READY = grpc.ChannelConnectivity.READY


class Replica:
    """One address: its channel, and whether it can be used."""

    def __init__(self, target: str, channel: grpc.aio.Channel, on_change: Callable[[], None]) -> None:
        self.target = target
        self.channel = channel
        self.state = channel.get_state(try_to_connect=True)
        self.n_in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.left_out_until = 0.0
        self._on_change = on_change
        self._watching = asyncio.create_task(self._watch())

    @property
    def worker(self) -> tuple[int, int] | None:
        """Which of how many processes that share the address it is; None where that is not known."""
        return None

    def began(self) -> None:
        """A call is under way to it."""
        self.n_in_flight += 1
        self.idle.clear()

    def ended(self) -> None:
        """A call has come back, whatever of it."""
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
    """The replicas of a target. Entered, it looks the name up and follows it.

    Args:
        target: ``host:port`` or ``dns:///host:port`` for all addresses of a name; any other gRPC name (``unix:…``,
            ``xds:///…``) is one replica, balanced by gRPC.
        stage: what the peer is, for errors.
        connect: makes a replica of a gRPC name of one address, and the authority that it stands for.
        is_stale: whether open channels have to be replaced, asked as often as the name is looked up.
        resolve: gRPC names of the addresses of a host and port; may raise OSError.
        resolve_interval_s: how often the name is looked up.
        patience_s: how long `pick` waits for a replica.
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
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._target = target
        self._stage = stage
        self._connect = connect
        self._is_stale = is_stale
        self._resolve = resolve or look_up
        self._resolve_interval_s = resolve_interval_s
        self._patience_s = patience_s
        self._replicas: dict[str, R] = {}
        self._fellows: dict[str, list[R]] = {}
        """Further channels to an address that several processes share."""
        self._authorities: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._match = _DNS_TARGET.fullmatch(target)

    async def start(self) -> None:
        """Look the name up, and go on doing so."""
        await self._refresh()
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
        await asyncio.gather(*(replica.close() for replica in self._all()), *self._closing)

    def _all(self) -> Iterable[R]:
        return chain(self._replicas.values(), *self._fellows.values()) if self._fellows else self._replicas.values()

    def usable(self) -> list[R]:
        """Those that take calls now."""
        return [replica for replica in self._all() if replica.state is READY]

    def targets(self) -> list[tuple[str, str]]:
        """The addresses behind the name, used or not, each with the authority that it stands for."""
        return list(self._authorities.items())

    async def pick(self, *, but: Iterable[R] = (), patience_s: float | None = None) -> R:
        """The replica for the next call: of those that can be used the one with the least under way, in turn where that is equal.

        Args:
            but: those that were tried already, taken only if there is no other.
            patience_s: how long to wait if there is none.

        Raises:
            Unavailable: there is none.
        """
        if (found := self._best(but)) is not None:
            return found
        patience_s = self._patience_s if patience_s is None else min(patience_s, self._patience_s)
        end = time.monotonic() + patience_s
        while (left := end - time.monotonic()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
            if (found := self._best(but)) is not None:
                return found
        raise Unavailable(f"the {self._stage} service cannot be reached", stage=self._stage)

    def _best(self, but: Iterable[R]) -> R | None:
        usable = self.usable()
        if len(usable) < 2:
            return usable[0] if usable else None
        now = time.monotonic()
        self._turn += 1
        fresh = [replica for replica in usable if replica not in but] or usable
        well = [replica for replica in fresh if replica.left_out_until <= now] or fresh
        return min((well[(self._turn + index) % len(well)] for index in range(len(well))), key=lambda each: each.n_in_flight)

    def leave_out(self, replica: R) -> None:
        """It failed or lags: use others for a while, if there are any."""
        replica.left_out_until = time.monotonic() + LEFT_OUT_S

    async def _follow(self) -> None:
        n_tries = 0
        while True:
            is_reaching = self._reach_workers() and n_tries < MAX_REACH_TRIES
            n_tries = n_tries + 1 if is_reaching else 0
            await asyncio.sleep(min(REACH_INTERVAL_S, self._resolve_interval_s) if is_reaching else self._resolve_interval_s)
            if not is_reaching:
                await self._refresh()

    async def _refresh(self) -> None:
        if self._match is None:
            self._set({self._target: ""})
            return
        try:
            found = await self._resolve(self._match["host"].strip("[]"), int(self._match["port"]))
        except OSError:
            return  # what was known is kept: the name service may be away for a while
        self._set(dict.fromkeys(found, self._target.removeprefix("dns:///")))

    def _set(self, targets: dict[str, str]) -> None:
        for target in list(self._replicas) if self._is_stale() else self._replicas.keys() - targets.keys():
            for replica in (self._replicas.pop(target), *self._fellows.pop(target, ())):
                self._let_go(replica)
        self._authorities = targets
        for target, authority in targets.items():
            if target not in self._replicas:
                self._replicas[target] = self._connect(target, authority, self._changed.set)
        self._changed.set()

    def _reach_workers(self) -> bool:
        """Have a channel to each process where several share an address, and say whether some are missing.

        Which one a connection reaches is for the kernel to say: more are opened until all are reached, and those that reach one
        a second time are closed.
        """
        is_missing = False
        for target, first in self._replicas.items():
            _, count = first.worker or ALONE
            if count == 1:
                continue
            reached, kept, n_unknown = set(), [], 0
            for replica in (first, *self._fellows.get(target, ())):
                if replica.worker is None:
                    n_unknown += 1
                elif replica.worker in reached:
                    self._let_go(replica)
                    continue
                else:
                    reached.add(replica.worker)
                kept.append(replica)
            n_missing = count - len(reached)
            kept += [self._connect(target, self._authorities[target], self._changed.set) for _ in range(n_missing - n_unknown)]
            self._fellows[target] = kept[1:]
            is_missing |= n_missing > 0
        return is_missing

    def _let_go(self, replica: R) -> None:
        task = asyncio.create_task(self._retire(replica))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _retire(self, replica: R) -> None:
        """Its address is not behind the name any more; what is under way to it may end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(replica.idle.wait(), RETIRE_TIMEOUT_S)
        await replica.close()


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, as gRPC names.

    Raises:
        OSError: the name is not known, or cannot be looked up now.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [_address(family, sockaddr) for family, *_, sockaddr in found]


def _address(family: int, sockaddr: tuple[Any, ...]) -> str:
    """The name that gRPC has for one address."""
    if family == socket.AF_INET6:
        return f"ipv6:[{sockaddr[0]}]:{sockaddr[1]}"
    return f"ipv4:{sockaddr[0]}:{sockaddr[1]}"
