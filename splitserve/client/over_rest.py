"""The client's transport over HTTP, blocking and async. Tensors are sent and received as binary data after the JSON."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpx

from splitserve.client import rest_bodies
from splitserve.client.connection import TLS, AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.retries import Failed
from splitserve.client.steps import Ask, Send
from splitserve.client.stop import Stop
from splitserve.errors import DeadlineExceeded, TooLarge, Unavailable

_STAGE = "server"


class RestTransport:
    """Sends on its own connection pool. Thread-safe."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        self._connection = connection
        self._token = token
        self._http = httpx.Client(**_arguments(connection))

    def send(self, step: Send, stop: Stop | None) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        end = time.monotonic() + step.timeout_s
        headers = request_headers(self._connection.headers, self._token)
        with _translating(can_retry=True):
            response = self._http.send(_request(self._http, self._connection, step, headers), stream=True)
        with contextlib.closing(response), _translating(can_retry=False):
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                _check_size(body, self._connection.max_message_bytes)
                if time.monotonic() > end:
                    raise _timed_out()
        return _decode(step.ask, response, bytes(body))

    def close(self) -> None:
        self._http.close()


class AsyncRestTransport:
    """Sends on its own connection pool."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._connection = connection
        self._token = token
        self._http = httpx.AsyncClient(**_arguments(connection))

    async def send(self, step: Send) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        headers = await request_headers_async(self._connection.headers, self._token)
        request = _request(self._http, self._connection, step, headers)
        try:
            async with asyncio.timeout(step.timeout_s):
                with _translating(can_retry=True):
                    response = await self._http.send(request, stream=True)
                async with contextlib.aclosing(response):
                    with _translating(can_retry=False):
                        body = bytearray()
                        async for part in response.aiter_bytes():
                            body += part
                            _check_size(body, self._connection.max_message_bytes)
        except TimeoutError as error:
            raise _timed_out() from error
        return _decode(step.ask, response, bytes(body))

    async def close(self) -> None:
        await self._http.aclose()


def _arguments(connection: ConnectionOptions) -> dict[str, Any]:
    return {
        "base_url": connection.target,
        "headers": {"accept-encoding": "gzip" if connection.compression else "identity"},
        "verify": _context(connection.tls)
        if connection.tls
        else False,  # creating a context takes time, for nothing with plain text
        # As over gRPC: a proxy in the environment is for traffic that leaves the cluster, and ~/.netrc is for other programs.
        "trust_env": False,
    }


def _context(tls: TLS) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def _request(
    http: httpx.Client | httpx.AsyncClient, connection: ConnectionOptions, step: Send, headers: dict[str, str]
) -> httpx.Request:
    """Raises:
    Failed: it exceeds the limit.
    """
    rest_request = rest_bodies.encode(step.ask, compress=connection.compression is not None)
    if len(rest_request.body) > connection.max_message_bytes:
        message = (
            f"the request has {len(rest_request.body)} bytes, the limit is {connection.max_message_bytes} (max_message_bytes)"
        )
        raise Failed(TooLarge(message, model=step.ask.model, pair=step.ask.version))
    headers = {**headers, **rest_request.headers, "request-timeout": f"{max(step.timeout_s, 0.001):.3f}"}
    return http.build_request(
        rest_request.method, rest_request.path, content=rest_request.body, headers=headers, timeout=step.timeout_s
    )


def _decode(ask: Ask, response: httpx.Response, body: bytes) -> Any:
    return rest_bodies.decode(ask, response.status_code, response.headers, body)


def _check_size(body: bytearray, limit: int) -> None:
    if len(body) > limit:
        raise Failed(TooLarge(f"the response exceeds the limit of {limit} bytes (max_message_bytes)"))


def _timed_out() -> Failed:
    return Failed(DeadlineExceeded("the server did not answer in time", stage=_STAGE))


@contextlib.contextmanager
def _translating(*, can_retry: bool) -> Iterator[None]:
    """Raise transport errors as `Failed`. ``can_retry``: no part of a response has arrived."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise _timed_out() from error
    except httpx.HTTPError as error:
        if _is_untrusted(error):
            raise Failed(Unavailable("the server's certificate is not trusted", stage=_STAGE)) from error
        raise Failed(Unavailable("the server cannot be reached", stage=_STAGE), can_retry=can_retry) from error


def _is_untrusted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None
