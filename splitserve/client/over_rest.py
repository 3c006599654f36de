"""The client's transport over HTTP/1.1, blocking and async. Tensors are sent and received as binary data after the JSON."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

from splitserve.client import rest_bodies
from splitserve.client.connection import AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.http1 import BrokenResponse, ResponseReader, encode_request
from splitserve.client.retries import Failed
from splitserve.client.sockets import (
    AsyncSocket,
    BlockingSocket,
    C,
    Endpoint,
    Pool,
    is_certificate_error,
    timed_out,
    tls_context,
    unreachable,
)
from splitserve.client.steps import Ask, Send
from splitserve.client.stop import Stop, cancelling
from splitserve.errors import SplitserveError, TooLarge, Unavailable

_STAGE = "server"
MAX_IDLE = 128
"""Connections that are kept for further requests."""


class RestTransport:
    """Sends on connections of its own. Thread-safe: each request has one to itself."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        self._requests = _Requests(connection)
        self._connection = connection
        self._token = token
        self._pool: Pool[BlockingSocket] = Pool(MAX_IDLE)

    def send(self, step: Send, stop: Stop | None) -> Any:
        """Make one attempt; setting ``stop`` cancels it.

        Raises:
            Failed: the error, and whether it can be retried.
            Cancelled: ``stop`` was set.
        """
        end = time.monotonic() + step.timeout_s
        headers = request_headers(self._connection.headers, self._token, step.ask.headers)
        parts = self._requests.encode(step, headers)
        reader = ResponseReader(self._connection.max_message_bytes)
        try:
            used = self._pool.take() or self._pool.add(BlockingSocket(self._requests.endpoint, end))
        except OSError as error:
            raise self._requests.not_connected(error) from error
        try:
            with cancelling(stop, used.cancel):
                used.send(parts, end)
                while not reader.is_complete:
                    reader.feed(used.receive(end))
        except (OSError, BrokenResponse, TooLarge) as error:
            self._pool.drop(used)
            raise self._requests.failed(error, reader) from error
        except BaseException:
            self._pool.drop(used)
            raise
        _give_back(self._pool, used, reader)
        return self._requests.decode(step.ask, reader)

    def close(self) -> None:
        """Close idle connections now, those in use after their response."""
        self._pool.close()

    def abandon(self) -> None:
        """In a forked child: close its copies of the parent's connections."""
        self._pool.abandon()


class AsyncRestTransport:
    """Sends on connections of its own, on the event loop that is running when it is created."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._requests = _Requests(connection)
        self._connection = connection
        self._token = token
        self._pool: Pool[AsyncSocket] = Pool(MAX_IDLE)

    async def send(self, step: Send) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        headers = await request_headers_async(self._connection.headers, self._token, step.ask.headers)
        parts = self._requests.encode(step, headers)
        reader = ResponseReader(self._connection.max_message_bytes)
        used: AsyncSocket | None = None
        try:
            async with asyncio.timeout(None if step.timeout_s == float("inf") else step.timeout_s):
                used = self._pool.take()
                if used is None:
                    used = self._pool.add(await AsyncSocket.connect(self._requests.endpoint))
                await used.send(parts)
                while not reader.is_complete:
                    reader.feed(await used.receive())
        except (OSError, BrokenResponse, TooLarge) as error:
            if used is None and isinstance(error, OSError):
                raise self._requests.not_connected(error) from error
            if used is not None:
                self._pool.drop(used)
            raise self._requests.failed(error, reader) from error
        except BaseException:
            if used is not None:
                self._pool.drop(used)
            raise
        _give_back(self._pool, used, reader)
        return self._requests.decode(step.ask, reader)

    async def close(self) -> None:
        """Close idle connections now, those in use after their response."""
        self._pool.close()

    def abandon(self) -> None:
        """Close all connections, of an event loop that has ended or of the process that this one was forked from."""
        self._pool.abandon()


def _give_back(pool: Pool[C], used: C, reader: ResponseReader) -> None:
    """Its response has arrived."""
    if reader.keeps_alive:
        pool.release(used)
    else:
        pool.drop(used)


class _Requests:
    """Requests as bytes, and what responses and failures mean."""

    def __init__(self, connection: ConnectionOptions) -> None:
        url = urlsplit(connection.target)
        is_secure = url.scheme == "https"
        self._connection = connection
        self._host = url.netloc.rpartition("@")[2]
        self._base = url.path.rstrip("/")
        self.endpoint = Endpoint(
            connection.target,
            url.hostname or "",
            url.port or (443 if is_secure else 80),
            context=tls_context(connection.tls, "http/1.1") if connection.tls else None,
        )

    def encode(self, step: Send, headers: dict[str, str]) -> list[bytes]:
        """The parts of a request.

        Raises:
            Failed: it exceeds the limit.
        """
        request = rest_request(self._connection, step)
        fields = {**_FIELDS, "user-agent": self._connection.user_agent}
        if self._connection.compression:
            fields["accept-encoding"] = "gzip"
        fields |= headers
        fields |= request.headers
        host = fields.pop("host", self._host)  # of a server behind an ingress that routes by it
        return encode_request(request.method, self._base + request.path, host, fields, request.body)

    def not_connected(self, error: OSError) -> Failed:
        """A failure without a connection."""
        if isinstance(error, TimeoutError):
            return Failed(timed_out(self.endpoint, "the server did not accept a connection in time"))
        return Failed(unreachable(self.endpoint, error), can_retry=not is_certificate_error(error))

    def failed(self, error: OSError | BrokenResponse | TooLarge, reader: ResponseReader) -> Failed:
        """A failure on a connection. It can be retried if no part of a response has arrived."""
        if isinstance(error, TooLarge):
            return Failed(error)
        if isinstance(error, TimeoutError):
            return Failed(timed_out(self.endpoint))
        if isinstance(error, OSError):
            return Failed(unreachable(self.endpoint, error), can_retry=not reader.is_begun and not is_certificate_error(error))
        hint = f"; is it the gRPC port? Use grpc://{self._host}" if error.is_http2 else ""
        message = f"the server cannot be reached: {self.endpoint.url}: {error}{hint}"
        return Failed(Unavailable(message, stage=_STAGE), can_retry=not error.is_begun)

    def decode(self, ask: Ask, reader: ResponseReader) -> Any:
        """What the response says."""
        try:
            body = reader.body()
        except BrokenResponse as error:
            raise Failed(Unavailable(f"malformed response: {self.endpoint.url}: {error}", stage=_STAGE)) from error
        except SplitserveError as error:
            raise Failed(error) from error
        return rest_bodies.decode(ask, reader.status, reader.headers, body, self.endpoint.url)


_FIELDS = {"accept": "*/*", "accept-encoding": "identity"}


def rest_request(connection: ConnectionOptions, step: Send) -> rest_bodies.RestRequest:
    """The request of a step, with its deadline.

    Raises:
        Failed: it exceeds the limit.
    """
    request = rest_bodies.encode(step.ask, compress=connection.compression is not None)
    if len(request.body) > connection.max_message_bytes:
        message = f"the request has {len(request.body)} bytes, the limit is {connection.max_message_bytes} (max_message_bytes)"
        raise Failed(TooLarge(message, model=step.ask.model, pair=step.ask.version))
    if step.timeout_s < float("inf"):
        request.headers["request-timeout"] = f"{max(step.timeout_s, 0.001):.3f}"
    return request
