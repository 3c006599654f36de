"""The client's transport over gRPC without grpcio: it costs less, and works in forked children, where the threads of grpcio are
missing.

A blocking connection has one call at a time, on the thread that makes it; its frames are read while a call waits, so nothing
runs in the background. An event loop has one connection for all calls. Source: RFC 9113; gRPC, doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import os
import ssl
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec

from splitserve.client.connection import AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.over_grpc import METHODS, AsyncGrpcTransport, as_failed, decode, encode, is_unusable, metadata
from splitserve.client.retries import Failed
from splitserve.client.sockets import (
    MAX_IDLE_S,
    AsyncSocket,
    BlockingSocket,
    Endpoint,
    Pool,
    SocketTransport,
    addresses,
    is_certificate_error,
    timed_out,
    tls_context,
    unreachable,
)
from splitserve.client.steps import Ask, Send
from splitserve.client.stop import Stop, cancelling
from splitserve.errors import TooLarge, Unavailable
from splitserve.remote.channel import TO_ANY_SERVER
from splitserve.remote.inference import translate
from splitserve.wire.grpc.messages import CallError
from splitserve.wire.grpc.unary import ConnectionBroken, UnaryCall, UnaryConnection
from splitserve.wire.http2.connection import TICK_INTERVAL_S

_STAGE = "server"
_MAX_IDLE = 16


class _Status(grpc.RpcError):
    """A status, in the form that grpcio raises."""

    def __init__(self, error: CallError) -> None:
        super().__init__(error.message)
        self._error = error

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[self._error.code]

    def details(self) -> str:
        return self._error.message

    def trailing_metadata(self) -> Any:
        return tuple(self._error.trailing)


class _Ended(Exception):
    """A call has failed. ``is_begun``: a response had begun."""

    def __init__(self, error: CallError, *, is_begun: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_begun = is_begun


class _Requests:
    """Requests as messages, and what statuses and failures mean."""

    def __init__(self, connection: ConnectionOptions) -> None:
        if connection.channel is not None:
            raise ValueError("a channel cannot be used in a forked child; make another client there")
        if connection.proxy:
            raise ValueError("proxy: gRPC through a proxy cannot be used in a forked child; use an http:// URL there")
        self._connection = connection
        self.endpoint = _endpoint(connection)
        host = self.endpoint.host or "localhost"
        host = f"[{host}]" if ":" in host else host
        self._authority = f"{host}:{self.endpoint.port}" if self.endpoint.port else host

    def http2(self, **options: Any) -> UnaryConnection:
        """An HTTP/2 connection to the endpoint, for a socket."""
        scheme = "https" if self.endpoint.context else "http"
        return UnaryConnection(self._authority, scheme, self._connection.max_message_bytes, **options)

    def begin(
        self,
        used: UnaryConnection,
        step: Send,
        headers: dict[str, str],
        message: bytes,
        timeout_s: float,
        on_end: Callable[[UnaryCall, CallError | None], None],
    ) -> UnaryCall:
        """Begin a call.

        Raises:
            Failed: the message exceeds the limit.
        """
        method = METHODS[step.ask.verb]
        try:
            return used.call(
                f"/{method.service}/{method.name}",
                metadata({"user-agent": self._connection.user_agent, **headers}),
                message,
                on_end,
                timeout_s=timeout_s,
                is_compressed=self._connection.compression is not None,
            )
        except CallError as error:
            raise Failed(TooLarge(f"{error.message} (max_message_bytes)", stage=_STAGE)) from error

    def not_connected(self, error: OSError) -> Failed:
        """A failure without a connection."""
        if isinstance(error, TimeoutError):
            return Failed(timed_out(self.endpoint, "the server did not accept a connection in time"))
        return Failed(unreachable(self.endpoint, error), can_retry=not is_certificate_error(error))

    def failed(self, ask: Ask, ended: _Ended) -> Failed | None:
        """The failure of a call; None: it is the answer that a model is not ready."""
        cause = ended.error.__cause__
        if isinstance(cause, OSError):
            return Failed(unreachable(self.endpoint, cause), can_retry=not ended.is_begun and not is_certificate_error(cause))
        status = _Status(ended.error)
        if ask.verb == "model_ready" and status.code() is grpc.StatusCode.NOT_FOUND:
            return None
        failed = as_failed(ask, translate(status, _STAGE), status.details(), status.trailing_metadata(), self._connection)
        failed.__cause__ = status
        if isinstance(ended.error, ConnectionBroken):
            failed.can_retry = failed.can_retry and not ended.is_begun
        return failed


class _BlockingConnection:
    """A connection for one call after another: its own event loop, and its own transport."""

    def __init__(self, requests: _Requests, end: float) -> None:
        self._socket = BlockingSocket(requests.endpoint, end)
        self._end = end
        self._soon: deque[Callable[[], Any]] = deque()
        self._error: OSError | None = None
        self._http2 = requests.http2(loop=self)
        self._http2.connection_made(self)
        self._http2.start()
        self._run_soon()

    @property
    def is_usable(self) -> bool:
        """Whether another call can be made. Control frames that came while it was idle are read first."""
        if time.monotonic() - self._socket.idle_since > MAX_IDLE_S:
            return False
        if not self._socket.is_usable:
            self._end = time.monotonic() + 0.1
            with contextlib.suppress(OSError):
                self._receive()
        return self._http2.is_usable

    def call(self, begin: Callable[[UnaryConnection, Callable[..., None]], UnaryCall], end: float) -> bytes:
        """Make a call: the response's message.

        Raises:
            _Ended: the call failed.
            OSError: as `BlockingSocket`.
        """
        self._end = end
        errors: list[CallError | None] = []
        call = begin(self._http2, lambda _, error: errors.append(error))
        self._run_soon()
        while not errors:
            self._receive()
        if errors[0] is not None:
            raise _Ended(errors[0], is_begun=call.is_begun)
        return call.message or b""

    def released(self) -> None:
        """It is idle from now on."""
        self._socket.released()

    def cancel(self) -> None:
        """From another thread: end the call."""
        self._socket.cancel()

    def _receive(self) -> None:
        data = self._socket.receive(self._end)
        if data:
            self._http2.data_received(data)
        else:
            self._http2.connection_lost(None)
        self._run_soon()

    def _run_soon(self) -> None:
        while self._soon:
            self._soon.popleft()()

    # As an event loop.

    def time(self) -> float:
        return time.monotonic()

    def call_soon(self, callback: Callable[[], Any]) -> None:
        self._soon.append(callback)

    def create_future(self) -> Any:
        raise NotImplementedError("nothing waits on a blocking connection")

    # As a transport.

    def write(self, data: bytes | memoryview) -> None:
        self._socket.send([data], self._end)

    def writelines(self, pieces: list[bytes | memoryview]) -> None:
        self._socket.send(pieces, self._end)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self.call_soon(lambda: self._http2.connection_lost(None))

    abort = close


class OwnGrpcTransport:
    """Sends on connections of its own. Thread-safe: each call has one to itself."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        self._connection = connection
        self._token = token
        self._requests = _Requests(connection)
        self._pool: Pool[_BlockingConnection] = Pool(_MAX_IDLE)

    def send(self, step: Send, stop: Stop | None) -> Any:
        """Make one attempt; setting ``stop`` cancels it.

        Raises:
            Failed: the error, and whether it can be retried.
            Cancelled: ``stop`` was set.
        """
        end = time.monotonic() + step.timeout_s
        headers = request_headers(self._connection.headers, self._token, step.ask.headers)
        message = encode(step.ask).SerializeToString()
        try:
            used = self._pool.take() or self._pool.add(_BlockingConnection(self._requests, end))
        except OSError as error:
            raise self._requests.not_connected(error) from error

        def begin(http2: UnaryConnection, on_end: Callable[..., None]) -> UnaryCall:
            return self._requests.begin(http2, step, headers, message, end - time.monotonic(), on_end)

        try:
            with cancelling(stop, used.cancel):
                data = used.call(begin, end)
        except _Ended as ended:
            self._pool.release(used) if used.is_usable else self._pool.drop(used)
            failed = self._requests.failed(step.ask, ended)
            if failed is None:
                return False
            raise failed from failed.__cause__
        except OSError as error:
            self._pool.drop(used)
            if isinstance(error, TimeoutError):
                raise Failed(timed_out(self._requests.endpoint)) from error
            raise Failed(unreachable(self._requests.endpoint, error)) from error
        except BaseException:
            self._pool.drop(used)
            raise
        self._pool.release(used)
        return decode(step.ask, METHODS[step.ask.verb].response.FromString(data))

    def close(self) -> None:
        """Close idle connections now, those in use after their call."""
        self._pool.close()

    def abandon(self) -> None:
        """In a forked child: close its copies of the parent's connections."""
        self._pool.abandon()


class AsyncOwnGrpcTransport:
    """Sends on one connection of its own, on the event loop that is running when it is created.

    A name with several addresses is left to grpcio, which balances between them.
    """

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._requests = _Requests(connection)
        self._connection = connection
        self._token = token
        self._loop = asyncio.get_running_loop()
        self._current: UnaryConnection | None = None
        self._connecting: asyncio.Task[UnaryConnection] | None = None
        self._n_connecting = 0
        """Calls that wait for it."""
        self._transports: dict[UnaryConnection, SocketTransport] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Calls that wait because the server allows no more at once."""
        self._idle_since = 0.0
        self._ticks: asyncio.TimerHandle | None = None
        self._balanced: AsyncGrpcTransport | None = None
        self._is_balanced: bool | None = None if _is_name(self._requests.endpoint) else False

    async def send(self, step: Send) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        if self._is_balanced is not False and await self._uses_grpcio(step.timeout_s):
            assert self._balanced is not None
            return await self._balanced.send(step)
        began = self._loop.time()
        headers = await request_headers_async(self._connection.headers, self._token, step.ask.headers)
        message = encode(step.ask).SerializeToString()
        used = self._usable()
        if used is None:
            used = await self._connected(step)
        left_s = step.timeout_s - (self._loop.time() - began)
        answer: asyncio.Future[bytes] = self._loop.create_future()

        def on_end(call: UnaryCall, error: CallError | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(call.message or b"")
            else:
                answer.set_exception(_Ended(error, is_begun=call.is_begun))

        call = self._requests.begin(used, step, headers, message, left_s, on_end)
        timer = None if left_s == math.inf else self._loop.call_later(left_s, _time_out, answer)
        if self._ticks is None:
            self._ticks = self._loop.call_later(TICK_INTERVAL_S, self._tick)
        try:
            data = await answer
        except _Ended as ended:
            failed = self._requests.failed(step.ask, ended)
            if failed is None:
                return False
            raise failed from failed.__cause__
        except TimeoutError as error:
            used.cancel(call)
            raise Failed(timed_out(self._requests.endpoint)) from error
        except asyncio.CancelledError:
            used.cancel(call)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return decode(step.ask, METHODS[step.ask.verb].response.FromString(data))

    async def close(self) -> None:
        """Close the connections."""
        if self._balanced is not None:
            await self._balanced.close()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._ticks is not None:
            self._ticks.cancel()
        for used in list(self._transports):
            used.close()
        await asyncio.sleep(0)  # what was written is sent, and the sockets are closed

    def abandon(self) -> None:
        """Close all connections, of an event loop that has ended or of the process that this one was forked from."""
        if self._balanced is not None:
            self._balanced.abandon()
        for transport in self._transports.values():
            transport.abandon()

    async def _uses_grpcio(self, timeout_s: float) -> bool:
        """Whether the name has several addresses."""
        if self._is_balanced is None:
            try:
                async with asyncio.timeout(None if timeout_s == math.inf else timeout_s):
                    found = {address for *_, address in await addresses(self._requests.endpoint)}
            except OSError as error:
                raise self._requests.not_connected(error) from error
            if len(found) > 1 and self._is_balanced is None and not is_unusable():
                self._balanced = AsyncGrpcTransport(self._connection, self._token)
            self._is_balanced = self._balanced is not None
        return self._is_balanced

    def _usable(self) -> UnaryConnection | None:
        """The connection, if a call can begin on it now."""
        used = self._current
        if used is None or not used.is_usable or self._waiting or used.n_calls >= used.max_calls:
            return None
        if not used.n_calls:
            if self._loop.time() - self._idle_since > MAX_IDLE_S:
                used.close()
                return None
            self._transports[used].read()  # its end may have arrived while the event loop did not run
        return used if used.is_usable else None

    async def _connected(self, step: Send) -> UnaryConnection:
        """A connection on which a call can begin.

        Raises:
            Failed: there is none.
        """
        try:
            async with asyncio.timeout(None if step.timeout_s == math.inf else step.timeout_s):
                while True:
                    used = self._current
                    if used is None or not used.is_usable:
                        used = await self._connection_made()
                    if used.is_usable and used.n_calls < used.max_calls:
                        return used
                    if used.is_usable:
                        await self._turn()
        except _Ended as ended:
            raise self._requests.failed(step.ask, ended) or AssertionError from ended
        except OSError as error:
            raise self._requests.not_connected(error) from error

    async def _turn(self) -> None:
        """Wait until a call has ended."""
        turn = self._loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled():
                self._wake_next()
            raise

    def _wake_next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def _connection_made(self) -> UnaryConnection:
        """A new connection: calls share the attempt, and it ends with the last call that waits for it."""
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
        attempt = self._connecting
        self._n_connecting += 1
        try:
            return await asyncio.shield(attempt)
        finally:
            self._n_connecting -= 1
            if not self._n_connecting:
                attempt.cancel()
                self._connecting = None

    async def _connect(self) -> UnaryConnection:
        """Connect, and wait for the server's settings."""
        connected = await AsyncSocket.connect(self._requests.endpoint)
        is_settled = asyncio.Event()

        def changed() -> None:
            if used.is_ready or not used.is_usable:
                is_settled.set()
            self._changed(used)

        used = self._requests.http2(
            on_change=changed,
            keepalive_time_s=TO_ANY_SERVER.time_ms / 1000,
            keepalive_timeout_s=TO_ANY_SERVER.timeout_ms / 1000,
        )
        transport = self._transports[used] = SocketTransport(connected, used)
        used.start()
        try:
            await is_settled.wait()
        except asyncio.CancelledError:
            transport.abort()
            raise
        if not used.is_usable:
            raise _Ended(used.broken(), is_begun=False)
        self._current = used
        self._idle_since = self._loop.time()
        return used

    def _changed(self, used: UnaryConnection) -> None:
        """A call has ended, or the connection has changed."""
        if not used.n_calls:
            self._idle_since = self._loop.time()
        if used.is_lost:
            self._transports.pop(used, None)
        if self._waiting:
            for _ in range(1 if used.is_usable else len(self._waiting)):
                self._wake_next()

    def _tick(self) -> None:
        """Keepalive, while calls are in flight."""
        self._ticks = None
        for used in list(self._transports):
            used.tick(self._loop.time())
        if any(used.n_calls or not used.is_usable for used in self._transports):
            self._ticks = self._loop.call_later(TICK_INTERVAL_S, self._tick)


def _time_out(answer: asyncio.Future[bytes]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def _is_name(endpoint: Endpoint) -> bool:
    """Whether the host is a name that may have several addresses."""
    if endpoint.path or endpoint.host == "localhost":
        return False
    try:
        ipaddress.ip_address(endpoint.host.partition("%")[0])
    except ValueError:
        return True
    return False


def has_one_address(connection: ConnectionOptions) -> bool:
    """Whether the target is an address, so that there is nothing to balance between."""
    return has_endpoint(connection) and not _is_name(_endpoint(connection))


def has_endpoint(connection: ConnectionOptions) -> bool:
    """Whether the target is one that this transport knows."""
    return _address(connection.target) is not None


def _address(target: str) -> tuple[str, int, str] | None:
    """Host, port and path of a Unix socket in a gRPC target; None: it is of a kind that only grpcio knows."""
    scheme, separator, rest = target.partition(":")
    if separator and scheme == "unix":
        return "", 0, "/" + rest.lstrip("/") if rest.startswith("/") else rest
    if separator and scheme == "unix-abstract":
        return "", 0, f"\0{rest}"
    if separator and scheme in ("dns", "ipv4", "ipv6", "passthrough"):
        if rest.startswith("//") and not rest.startswith("///"):  # a name server of its own
            return None
        target = rest.lstrip("/")
    host, _, port = target.rpartition(":")
    if not port.isdecimal() or not host or not set(host).isdisjoint("/,"):
        return None
    return host.strip("[]"), int(port), ""


def _endpoint(connection: ConnectionOptions) -> Endpoint:
    """The address in a gRPC target.

    Raises:
        Unavailable: it cannot be used without grpcio.
    """
    address = _address(connection.target)
    if address is None:
        raise Unavailable(f"{connection.target}: expected host:port: other gRPC names cannot be used in a forked child")
    context: ssl.SSLContext | None = None
    if connection.tls is not None:
        tls = connection.tls
        context = tls_context(tls if tls.ca_file else msgspec.structs.replace(tls, ca_file=_well_known_authorities()), "h2")
    host, port, path = address
    return Endpoint(connection.url, host, port, path=path, context=context)


def _well_known_authorities() -> str | None:
    """The file of those that grpcio trusts."""
    if path := os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"):
        return path
    path = str(Path(grpc.__file__).with_name("_cython") / "_credentials" / "roots.pem")
    return path if Path(path).exists() else None
