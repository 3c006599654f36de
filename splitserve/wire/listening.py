"""What every listening port has, REST or gRPC: the socket and the set of open connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

BACKLOG = 2048

HANDSHAKE_TIMEOUT_S = 10.0
"""Time for a new connection to complete the TLS handshake and, over HTTP/2, to send its preface and SETTINGS."""

FIRST_REQUEST_GRACE_S = 1.0
"""How long draining waits for the first request of a connection that was opened just before."""


def listen(host: str, port: int, *, shares_port: bool) -> socket.socket:
    """A listening socket; dual-stack for ``::``.

    Args:
        host: an address or a name.
        port: 0: a free one.
        shares_port: with other processes of the service (SO_REUSEPORT).

    Raises:
        SystemExit: the socket cannot be bound; the message says why.
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


class OpenConnection(Protocol):
    """A server connection, as its listener sees it."""

    def tick(self, now: float) -> None:
        """Apply the timeouts. Called at a regular interval with the loop's time."""

    def drain(self) -> None:
        """Accept no new requests, and close once those in flight are answered."""

    def abort(self) -> None:
        """Close at once; what was not written is lost."""


C = TypeVar("C", bound=OpenConnection)


class Connections(Generic[C]):
    """The open connections of a port. Each adds and removes itself."""

    def __init__(self) -> None:
        self._open: set[C] = set()
        self._is_empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[C]:
        """A snapshot: connections may close during the iteration."""
        return iter(tuple(self._open))

    def add(self, connection: C) -> None:
        self._open.add(connection)

    def remove(self, connection: C) -> None:
        self._open.discard(connection)
        if not self._open:
            self._is_empty.set()

    def tick(self) -> None:
        """Apply the timeouts of each connection."""
        now = asyncio.get_running_loop().time()
        for connection in self:
            connection.tick(now)

    def drain(self) -> None:
        """Drain each connection."""
        for connection in self:
            connection.drain()

    async def wait_closed(self, timeout_s: float) -> None:
        """Wait until all are closed, at most ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._open:
                    self._is_empty.clear()
                    await self._is_empty.wait()

    def abort(self) -> None:
        """Abort each connection."""
        for connection in self:
            connection.abort()
