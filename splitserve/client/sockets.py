"""Connections of the client: blocking, and on an event loop. Knows no protocol above TLS.

Sockets belong to no event loop, so that a client can be closed, and used again, after the loop that made them has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from splitserve.client.connection import TLS
from splitserve.errors import DeadlineExceeded, Unavailable

RECEIVE_BYTES = 256 * 1024
MAX_IDLE_S = 55.0
"""Older idle connections are not used again: a load balancer may have dropped them without a word (after 60 s: nginx, AWS)."""

_STAGE = "server"


class Endpoint(msgspec.Struct, frozen=True):
    """Where a server listens. ``path``: of a Unix socket, in place of host and port. ``url`` is for messages."""

    url: str
    host: str = ""
    port: int = 0
    path: str = ""
    context: ssl.SSLContext | None = None


def tls_context(tls: TLS, *protocols: str) -> ssl.SSLContext:
    """Certificates, and the protocols to negotiate."""
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    context.set_alpn_protocols(list(protocols))
    return context


def unreachable(endpoint: Endpoint, error: BaseException) -> Unavailable:
    """The error for a server that could not be connected to, or whose connection broke."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        text = getattr(cause, "verify_message", "") or "verification failed"
        return Unavailable(f"the server's certificate is not trusted: {endpoint.url}: {text}", stage=_STAGE)
    if isinstance(error, ssl.SSLError):
        hint = "; does it speak TLS?" if "WRONG_VERSION_NUMBER" in str(error) else ""
        return Unavailable(f"the server cannot be reached: {endpoint.url}: TLS failed: {error.reason}{hint}", stage=_STAGE)
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno:
        why = os.strerror(error.errno)  # asyncio puts other texts into its errors
    else:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Unavailable(f"the server cannot be reached: {endpoint.url}: {why}", stage=_STAGE)


def timed_out(endpoint: Endpoint, what: str = "the server did not answer in time") -> DeadlineExceeded:
    """The error for a deadline that passed."""
    return DeadlineExceeded(f"{what}: {endpoint.url}", stage=_STAGE)


def is_certificate_error(error: BaseException) -> bool:
    """Whether another attempt would fail, too."""
    return isinstance(error, ssl.SSLCertVerificationError)


class BlockingSocket:
    """One connection, for one thread at a time.

    Args:
        endpoint: of the server.
        end: on the monotonic clock, when connecting is given up.

    Raises:
        OSError: it cannot be reached; `TimeoutError` at the end.
    """

    def __init__(self, endpoint: Endpoint, end: float) -> None:
        if endpoint.path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.settimeout(_left(end))
                self._socket.connect(endpoint.path)
            except BaseException:
                self._socket.close()
                raise
        else:
            self._socket = socket.create_connection((endpoint.host, endpoint.port), timeout=_left(end))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if endpoint.context is not None:
            plain = self._socket
            try:
                self._socket = endpoint.context.wrap_socket(plain, server_hostname=endpoint.host or "localhost")
            except BaseException:
                plain.close()
                raise
        self.idle_since = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether it can be used again: nothing has arrived while it was idle, not even its end."""
        if time.monotonic() - self.idle_since > MAX_IDLE_S:
            return False
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return not poll.poll(0)
        except (OSError, ValueError):
            return False

    def send(self, parts: Iterable[bytes | memoryview], end: float) -> None:
        """Write everything."""
        for part in parts:
            self._socket.settimeout(_left(end))
            self._socket.sendall(part)

    def receive(self, end: float) -> bytes:
        """What has arrived; b"": the peer has closed."""
        self._socket.settimeout(_left(end))
        return self._socket.recv(RECEIVE_BYTES)

    def released(self) -> None:
        """It is idle from now on."""
        self.idle_since = time.monotonic()

    def cancel(self) -> None:
        """From another thread: end the connection, and what waits for it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # past TLS, whose state is the other thread's

    def close(self) -> None:
        """Close it; of a child's copy, only the copy."""
        self._socket.close()


def _left(end: float) -> float | None:
    """Seconds until a point in time, as a socket takes them."""
    if end == float("inf"):
        return None
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


async def addresses(endpoint: Endpoint) -> list[tuple[Any, ...]]:
    """As `socket.getaddrinfo`; in a thread, unless the host is an address."""
    options: dict[str, Any] = {"type": socket.SOCK_STREAM}
    try:
        return list(socket.getaddrinfo(endpoint.host, endpoint.port, flags=socket.AI_NUMERICHOST, **options))
    except socket.gaierror:
        return list(await asyncio.get_running_loop().getaddrinfo(endpoint.host, endpoint.port, **options))


class AsyncSocket:
    """One connection, for one task at a time, on the running event loop. From `connect`."""

    def __init__(self, plain: socket.socket) -> None:
        self._socket = plain
        self._loop = asyncio.get_running_loop()
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.idle_since = 0.0

    @classmethod
    async def connect(cls, endpoint: Endpoint) -> AsyncSocket:
        """Connect.

        Raises:
            OSError: the server cannot be reached.
        """
        if endpoint.path:
            return await cls._to(socket.AF_UNIX, endpoint.path, endpoint)
        found = await addresses(endpoint)
        failed: OSError | None = None
        for family, _, _, _, address in found:
            try:
                return await cls._to(family, address, endpoint)
            except ssl.SSLError:
                raise
            except OSError as error:
                failed = failed or error
        raise failed or OSError(f"{endpoint.host} has no address")

    @classmethod
    async def _to(cls, family: int, address: Any, endpoint: Endpoint) -> AsyncSocket:
        plain = socket.socket(family, socket.SOCK_STREAM)
        connection = cls(plain)
        try:
            plain.setblocking(False)
            if family != socket.AF_UNIX:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await connection._loop.sock_connect(plain, address)
            if endpoint.context is not None:
                await connection._start_tls(endpoint.context, endpoint.host or "localhost")
        except BaseException:
            plain.close()
            raise
        return connection

    @property
    def is_usable(self) -> bool:
        """As `BlockingSocket.is_usable`."""
        if time.monotonic() - self.idle_since > MAX_IDLE_S:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def send(self, parts: Iterable[bytes]) -> None:
        """Write everything."""
        for part in parts:
            if self._tls is None:
                await self._loop.sock_sendall(self._socket, part)
            else:
                self._tls.write(part)
                await self._flush()

    async def receive(self) -> bytes:
        """What has arrived; b"": the peer has closed."""
        if self._tls is None:
            return await self._loop.sock_recv(self._socket, RECEIVE_BYTES)
        while True:
            try:
                return self._tls.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    def released(self) -> None:
        """It is idle from now on."""
        self.idle_since = time.monotonic()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    async def _start_tls(self, context: ssl.SSLContext, server_name: str) -> None:
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            else:
                await self._flush()
                return

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._loop.sock_sendall(self._socket, data)

    async def _fill(self) -> None:
        data = await self._loop.sock_recv(self._socket, RECEIVE_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()


class SocketTransport:
    """What an `asyncio.Protocol` is connected to, on the running event loop. It can be closed after that ended, and in a child.

    Args:
        connected: its socket is this one's from now on.
        protocol: told what arrives, and when writing should pause.
    """

    def __init__(self, connected: AsyncSocket, protocol: asyncio.Protocol) -> None:
        self._socket, self._loop, self._tls = connected._socket, connected._loop, connected._tls
        self._incoming, self._outgoing = connected._incoming, connected._outgoing
        self._fd = self._socket.fileno()
        self._protocol = protocol
        self._pid = os.getpid()
        self._unsent = bytearray()
        self._is_closing = self._is_lost = False
        protocol.connection_made(self)  # type: ignore[arg-type]  # no asyncio.Transport: it has what is needed of one
        self._loop.add_reader(self._fd, self.read)
        if self._tls is not None:
            self._loop.call_soon(self.read)  # what came with the end of the handshake

    def read(self) -> None:
        """Deliver what has arrived, if anything has."""
        if self._is_lost:
            return
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            data = None
        except OSError as error:
            self._lose(error)
            return
        if self._tls is not None:
            self._decrypt(self._tls, data)
        elif data:
            self._protocol.data_received(data)
        elif data is not None:
            self._lose(None)

    def write(self, data: bytes | memoryview) -> None:
        """Send, in the background if the socket's buffer is full."""
        if self._is_lost or self._is_closing:
            return
        if self._tls is not None:
            self._tls.write(data)
            data = self._outgoing.read()
        self._send(data)

    def writelines(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Send them all."""
        self.write(b"".join(pieces))

    def close(self) -> None:
        """Close once everything is sent."""
        if not self._is_closing:
            self._is_closing = True
            if not self._unsent:
                self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        """Close at once."""
        self._is_closing = True
        self._loop.call_soon(self._lose, None)

    def abandon(self) -> None:
        """Close the socket, of an event loop that runs in another thread or has ended, or in a forked child its copy."""
        if self._is_lost:
            return
        if self._pid != os.getpid() or self._loop.is_closed():
            self._is_lost = True  # the event loop is left alone: a child shares the parent's registrations
            self._socket.close()
        elif self._loop.is_running():
            self._loop.call_soon_threadsafe(self.abort)
        else:
            self._lose(None)

    def _decrypt(self, tls: ssl.SSLObject, data: bytes | None) -> None:
        if data:
            self._incoming.write(data)
        elif data is not None:
            self._incoming.write_eof()
        while not self._is_lost:
            try:
                plain = tls.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                plain = b""
            except ssl.SSLError as error:
                self._lose(error)
                return
            if not plain:
                self._lose(None)
                return
            self._protocol.data_received(plain)
        if answer := self._outgoing.read():
            self._send(answer)

    def _send(self, data: bytes | memoryview) -> None:
        if not self._unsent:
            try:
                n_sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                n_sent = 0
            except OSError as error:
                self._loop.call_soon(self._lose, error)
                return
            if n_sent == len(data):
                return
            self._loop.add_writer(self._fd, self._send_rest)
            data = memoryview(data)[n_sent:]
        self._unsent += data
        self._protocol.pause_writing()

    def _send_rest(self) -> None:
        try:
            n_sent = self._socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        del self._unsent[:n_sent]
        if self._unsent:
            return
        self._loop.remove_writer(self._fd)
        if self._is_closing:
            self._lose(None)
        else:
            self._protocol.resume_writing()

    def _lose(self, error: Exception | None) -> None:
        if self._is_lost:
            return
        self._is_lost = self._is_closing = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        self._protocol.connection_lost(error)


class Reusable(Protocol):
    """A connection for one call after another."""

    @property
    def is_usable(self) -> bool:
        """Whether it can be used again."""
        ...

    def released(self) -> None:
        """It is idle from now on."""
        ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Reusable)


class Pool(Generic[C]):
    """The connections of a transport: each has one call at a time, and idle ones are used again. Thread-safe.

    Args:
        max_idle: how many are kept for further calls.
    """

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        self._idle: deque[C] = deque()
        self._all: set[C] = set()
        self._is_closed = False

    def take(self) -> C | None:
        """An idle one that can be used; None: a new one is needed."""
        while self._idle:
            try:
                used = self._idle.pop()
            except IndexError:  # another thread took the last one
                break
            if used.is_usable:
                return used
            self.drop(used)
        return None

    def add(self, made: C) -> C:
        """A new one, in use."""
        self._all.add(made)
        return made

    def release(self, used: C) -> None:
        """Its call is over, and it can be used again."""
        if self._is_closed or len(self._idle) >= self._max_idle:
            self.drop(used)
            return
        used.released()
        self._idle.append(used)

    def drop(self, used: C) -> None:
        """Close one that is in use."""
        self._all.discard(used)
        used.close()

    def close(self) -> None:
        """Close idle ones now, those in use after their call."""
        self._is_closed = True
        while self._idle:
            try:
                self.drop(self._idle.pop())
            except IndexError:
                break

    def abandon(self) -> None:
        """Close all: of an event loop that has ended, or in a forked child its copies of the parent's."""
        for each in list(self._all):
            each.close()
        self._all.clear()
        self._idle.clear()
