"""An HTTP/1.1 request, its body as it arrives, and the response: what a connection and its handler exchange."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import msgspec

from splitserve.wire.byte_budget import BudgetExceeded, ByteBudget
from splitserve.wire.cancellable import Cancellable

JSON = "application/json"  # exactly: KServe's client compares the whole header


class BodyTooLarge(Exception):
    """The request body exceeds its size limit."""


class HttpResponse(msgspec.Struct):
    """A whole response."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


Respond = Callable[[HttpResponse | Coroutine[Any, Any, HttpResponse]], None]
"""Delivers the response of a request whose handler returned a `Cancellable`; a coroutine is run as a task first."""

Handled = HttpResponse | Cancellable | Coroutine[Any, Any, HttpResponse]
"""What a handler returns: the response; work in progress, which will call `Respond`; or a coroutine to run as a task."""


class RequestBody(msgspec.Struct, eq=False):
    """The body of a request, kept as it arrives, within its own limit and the process' `ByteBudget`."""

    max_bytes: int
    budget: ByteBudget
    declared_length: bytes = b"0"
    """The value of Content-Length, if there is one."""

    n_bytes: int = 0
    """Received so far, kept or not."""

    is_complete: bool = False
    send_continue: Callable[[], None] | None = None
    """Sends ``100 Continue``; None if the client does not expect it. Source: RFC 9110, section 10.1.1."""

    _n_reserved: int = 0
    _chunks: list[bytes] = []
    _waiter: asyncio.Future[None] | None = None
    _error: BodyTooLarge | BudgetExceeded | None = None
    """Why the body is no longer kept."""

    async def read(self) -> bytes:
        """Wait for the whole body.

        Raises:
            BodyTooLarge, BudgetExceeded: as `content`; also before the end, as soon as it is known.
        """
        if not self.is_complete and self._error is None:
            if int(self.declared_length) > self.max_bytes:
                raise self._too_large()
            if self.send_continue is not None:
                self.send_continue()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.content()

    def content(self) -> bytes:
        """The body, if `is_complete`.

        Raises:
            BodyTooLarge: it exceeds its limit; what arrived was discarded.
            BudgetExceeded: the bodies of all requests together exceed theirs.
        """
        if self._error is not None:
            raise self._error
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def reserve(self, n_bytes: int) -> None:
        """Count more bytes as held by this request, e.g. those of its decompressed body. Raises `BudgetExceeded`."""
        self.budget.reserve(n_bytes)
        self._n_reserved += n_bytes

    # For the connection.

    def feed(self, chunk: bytes) -> None:
        """A part of the body arrived."""
        self.n_bytes += len(chunk)
        if self._error is not None:
            return
        try:
            if self.n_bytes > self.max_bytes:
                raise self._too_large()
            self.budget.reserve(len(chunk))
            self._n_reserved += len(chunk)
            self._chunks.append(chunk)
        except (BodyTooLarge, BudgetExceeded) as error:
            self._error = error
            self._chunks.clear()
            self._wake()

    def complete(self) -> None:
        """The body has arrived."""
        self.is_complete = True
        if self._waiter is not None:
            self._wake()

    def release(self) -> None:
        """The request is answered, or will not be: release what it has reserved."""
        if self._n_reserved:
            self.budget.release(self._n_reserved)
            self._n_reserved = 0

    def _too_large(self) -> BodyTooLarge:
        n_bytes = max(self.n_bytes, int(self.declared_length))
        return BodyTooLarge(f"request body: expected at most {self.max_bytes} bytes, got {n_bytes} or more")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpRequest(msgspec.Struct, eq=False):
    """A request whose headers are complete; its body may still be arriving.

    Header names are in lower case; values of repeated headers are joined by a comma. Source: RFC 9110, section 5.3.
    """

    peer: Hashable
    """Identifies the connection."""

    body: RequestBody
    method: str = ""
    path: str = ""
    headers: dict[bytes, bytes] = {}

    # For the connection.
    target: bytes = b""
    keep_alive: bool = False
    rejection: HttpResponse | None = None
    """The response that it gets without being handled."""

    address: Callable[[], str] = str
    """Gives the peer's address, ``host:port``; "" if it has none."""

    def header(self, name: bytes) -> str | None:
        """A header's value as text; None if it is absent."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")
