"""The client's transport over the caller's own httpx client, or through an HTTP proxy."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx

from splitserve.client import rest_bodies
from splitserve.client.connection import AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.over_rest import rest_request
from splitserve.client.retries import Failed
from splitserve.client.sockets import Endpoint, is_certificate_error, timed_out, tls_context, unreachable
from splitserve.client.steps import Ask, Send
from splitserve.client.stop import Stop
from splitserve.errors import TooLarge


class HttpxTransport:
    """Sends with an `httpx.Client`: the caller's, which stays open, or one of its own."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        self._connection = connection
        self._token = token
        self._own: httpx.Client | None = None if connection.http_client is not None else httpx.Client(**_arguments(connection))
        self._http: Any = connection.http_client or self._own
        if not isinstance(self._http, httpx.Client):
            raise ValueError(f"http_client: expected an httpx.Client, got {type(self._http).__name__}")

    def send(self, step: Send, stop: Stop | None) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        end = time.monotonic() + step.timeout_s
        headers = request_headers(self._connection.headers, self._token, step.ask.headers)
        with _translating(self._connection, can_retry=True):
            response = self._http.send(_request(self._http, self._connection, step, headers), stream=True)
        with contextlib.closing(response), _translating(self._connection, can_retry=False):
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                _check_size(body, self._connection)
                if time.monotonic() > end:
                    raise Failed(timed_out(Endpoint(self._connection.target)))
        return _decode(step.ask, response, bytes(body), self._connection)

    def close(self) -> None:
        """Close it, unless it is the caller's."""
        if self._own is not None:
            self._own.close()

    def abandon(self) -> None:
        """In a forked child: nothing. The sockets are the parent's."""


class AsyncHttpxTransport:
    """Sends with an `httpx.AsyncClient`: the caller's, which stays open, or one of its own."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._connection = connection
        self._token = token
        self._own = None if connection.http_client is not None else httpx.AsyncClient(**_arguments(connection))
        self._http: Any = connection.http_client or self._own
        if not isinstance(self._http, httpx.AsyncClient):
            raise ValueError(f"http_client: expected an httpx.AsyncClient, got {type(self._http).__name__}")

    async def send(self, step: Send) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        headers = await request_headers_async(self._connection.headers, self._token, step.ask.headers)
        request = _request(self._http, self._connection, step, headers)
        try:
            async with asyncio.timeout(None if step.timeout_s == float("inf") else step.timeout_s):
                with _translating(self._connection, can_retry=True):
                    response = await self._http.send(request, stream=True)
                async with contextlib.aclosing(response):
                    with _translating(self._connection, can_retry=False):
                        body = bytearray()
                        async for part in response.aiter_bytes():
                            body += part
                            _check_size(body, self._connection)
        except TimeoutError as error:
            raise Failed(timed_out(Endpoint(self._connection.target))) from error
        return _decode(step.ask, response, bytes(body), self._connection)

    async def close(self) -> None:
        """Close it, unless it is the caller's."""
        if self._own is not None:
            await self._own.aclose()

    def abandon(self) -> None:
        """In a forked child, or after the event loop has ended: nothing."""


def _arguments(connection: ConnectionOptions) -> dict[str, Any]:
    return {
        "verify": tls_context(connection.tls) if connection.tls else False,
        "proxy": connection.proxy or None,
        "trust_env": False,
    }


def _request(
    http: httpx.Client | httpx.AsyncClient, connection: ConnectionOptions, step: Send, headers: dict[str, str]
) -> httpx.Request:
    """Raises:
    Failed: it exceeds the limit.
    """
    request = rest_request(connection, step)
    fields = {
        "user-agent": connection.user_agent,
        "accept-encoding": "gzip" if connection.compression else "identity",
        **headers,
        **request.headers,
    }
    timeout = None if step.timeout_s == float("inf") else step.timeout_s
    # The time for a connection of the pool is the caller's own, not the server's.
    limits = httpx.Timeout(timeout, pool=None)
    return http.build_request(
        request.method, connection.target + request.path, content=request.body, headers=fields, timeout=limits
    )


def _decode(ask: Ask, response: httpx.Response, body: bytes, connection: ConnectionOptions) -> Any:
    return rest_bodies.decode(ask, response.status_code, response.headers, body, connection.target)


def _check_size(body: bytearray, connection: ConnectionOptions) -> None:
    if len(body) > connection.max_message_bytes:
        raise Failed(TooLarge(f"the response exceeds the limit of {connection.max_message_bytes} bytes (max_message_bytes)"))


@contextlib.contextmanager
def _translating(connection: ConnectionOptions, *, can_retry: bool) -> Iterator[None]:
    """Raise transport errors as `Failed`. ``can_retry``: no part of a response has arrived."""
    endpoint = Endpoint(connection.target)
    try:
        yield
    except httpx.TimeoutException as error:
        raise Failed(timed_out(endpoint)) from error
    except httpx.HTTPError as error:
        untrusted = is_certificate_error(error.__cause__ or error)
        raise Failed(unreachable(endpoint, error), can_retry=can_retry and not untrusted) from error
