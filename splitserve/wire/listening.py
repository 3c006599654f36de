"""What listens on a port, over REST and gRPC alike: the socket, and the connections that are open."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

BACKLOG = 2048

HANDSHAKE_TIMEOUT_S = 10.0
"""Within which a connection must have agreed on TLS, and over gRPC have said that it is HTTP/2."""


def listen(host: str, port: int, *, shares_port: bool) -> socket.socket:
    """A socket that listens; of all addresses of both families for ``::``.

    Args:
        host: an address or a name.
        port: 0 takes a free one.
        shares_port: with other processes of the service.

    Raises:
        SystemExit: that cannot be, for the reason that it gives.
    """
    is_v6 = ":" in host
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if is_v6 else socket.AF_INET,
            backlog=BACKLOG,
            reuse_port=shares_port,
            dualstack_ipv6=host == "::",
        )
    except OSError as error:
        raise SystemExit(f"cannot listen on {host}:{port}: {error.strerror}") from None


class Connection(Protocol):
    """One that is open."""

    def look(self, now: float) -> None:
        """Close it if it takes too long with something."""

    def abandon(self) -> None:
        """Close it at once."""


C = TypeVar("C", bound=Connection)


class Connections(Generic[C]):
    """Those that are open on a port. Each adds itself and leaves."""

    def __init__(self) -> None:
        self._open: set[C] = set()
        self._is_empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[C]:
        """They may leave meanwhile."""
        return iter(tuple(self._open))

    def add(self, connection: C) -> None:
        """It is open."""
        self._open.add(connection)

    def leave(self, connection: C) -> None:
        """It is closed."""
        self._open.discard(connection)
        if not self._open:
            self._is_empty.set()

    def look(self) -> None:
        """Close those that take too long."""
        now = asyncio.get_running_loop().time()
        for connection in self:
            connection.look(now)

    async def until_none(self, timeout_s: float) -> None:
        """Wait until none is left, but no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._open:
                    self._is_empty.clear()
                    await self._is_empty.wait()

    def abandon(self) -> None:
        """Close what is left at once."""
        for connection in self:
            connection.abandon()
