"""What every listening port has, REST or gRPC: the socket, what accepts its connections, and the set of those that are open."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import structlog

BACKLOG = 2048

HANDSHAKE_TIMEOUT_S = 10.0
"""Time for a new connection to complete the TLS handshake and, over HTTP/2, to send its preface and SETTINGS."""

FIRST_REQUEST_GRACE_S = 1.0
"""How long draining waits for the TLS handshake, and then for the first request, of a connection that was opened just before."""

CLOSE_GRACE_S = 0.5
"""How long clients get to read the last bytes when the server stops."""

ACCEPT_RETRY_S = 1.0
"""When to accept again after the process or the system ran out of file descriptors or memory."""

_MAX_ACCEPTED = 128
"""Connections accepted in one iteration of the event loop, so that requests in flight are served between them."""

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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


MAX_SOCKET_PATH_BYTES = 100
"""The system's limit is 108, or 104."""


def check_socket_path(path: str) -> str:
    """The path of a unix socket as it is; "" is none.

    Raises:
        ValueError: no socket can have it.
    """
    if path and not (path.startswith("/") and len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES):
        raise ValueError(f'expected an absolute path of at most {MAX_SOCKET_PATH_BYTES} bytes, got "{path[:128]}"')
    return path


def listen_unix(path: str) -> socket.socket:
    """A listening unix socket. A file that a process has left there when it was killed is replaced.

    Raises:
        SystemExit: the socket cannot be bound; the message says why.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_unused(path)
        listening.bind(path)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise SystemExit(f"cannot listen on {path}: {error.strerror}") from None
    return listening


def _remove_unused(path: str) -> None:
    """Remove a socket's file on which nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        try:
            trial.connect(path)
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            if Path(path).is_socket():
                Path(path).unlink()


def _remove_file(listening: socket.socket) -> None:
    """Remove the file of a unix socket, so that another process may listen on its path."""
    if listening.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            Path(listening.getsockname()).unlink()


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

    async def abort(self) -> None:
        """Abort each connection, and wait until all are closed."""
        for connection in self:
            connection.abort()
        await self.wait_closed(CLOSE_GRACE_S)


class Acceptor:
    """Accepts the connections of a listening socket.

    Used in place of `asyncio.Server`, which loses a connection that is accepted but not yet made when it closes: the client is
    neither served nor told. Source: python/cpython#109564.

    Args:
        socket: that listens; closed by `stop`.
        make: a new connection's protocol.
        context: of TLS; None: plain text.
    """

    def __init__(self, socket: socket.socket, make: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None) -> None:
        socket.setblocking(False)
        self._socket = socket
        self._make = make
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._accepted: set[asyncio.Task[None]] = set()
        """One for each connection that is not made yet, e.g. during its TLS handshake."""
        self._retry: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept connections."""
        self._loop.add_reader(self._socket, self._accept)

    async def stop(self) -> None:
        """Close the socket, once the connections that clients have opened are made; TLS handshakes may take a grace."""
        if self._socket.fileno() < 0:
            return
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._socket)
        _remove_file(self._socket)
        self._accept()
        self._socket.close()
        if self._accepted:
            await asyncio.wait(self._accepted, timeout=FIRST_REQUEST_GRACE_S)
        for connecting in tuple(self._accepted):
            connecting.cancel()
        await asyncio.gather(*self._accepted, return_exceptions=True)

    def _accept(self) -> None:
        for _n in range(_MAX_ACCEPTED):
            try:
                accepted, _address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                self._pause(error)
                return
            accepted.setblocking(False)
            connecting = self._loop.create_task(self._connect(accepted))
            self._accepted.add(connecting)
            connecting.add_done_callback(partial(self._connected, accepted))

    def _pause(self, error: OSError) -> None:
        # The process or the system has no file descriptor or memory for a connection; accepting is tried again after a pause.
        structlog.get_logger().warning("connections not accepted", reason=error.strerror, retry_in_s=ACCEPT_RETRY_S)
        self._loop.remove_reader(self._socket)
        self._retry = self._loop.call_later(ACCEPT_RETRY_S, self.start)

    async def _connect(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has left, or its TLS handshake failed
            await self._loop.connect_accepted_socket(
                self._make,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._context else None,
            )

    def _connected(self, accepted: socket.socket, connecting: asyncio.Task[None]) -> None:
        self._accepted.discard(connecting)
        if connecting.cancelled():  # perhaps before a transport had the socket
            accepted.close()
