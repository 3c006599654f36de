"""The HTTP server in front of the REST face: listens, drains, stops."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType

import msgspec

from proxy.rest.app import HttpApp
from splitserve.errors import Internal
from splitserve.server.lifecycle import background
from splitserve.server.tls import ServerTls, following_ssl_context
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.connection import Http1Connection
from splitserve.wire.http1.listener import HttpLimits, HttpListener
from splitserve.wire.http1.messages import HttpResponse
from splitserve.wire.listening import BACKLOG, HANDSHAKE_TIMEOUT_S, listen


class HttpFace:
    """Listens while entered.

    Args:
        app: the REST face.
        host: address to listen on.
        port: 0 takes a free one, see `port`.
        grace_s: how long calls in flight get once `drain` refuses new ones.
        limits: of connections.
        tls: files of the listener; None: plain text.
        shares_port: with other processes of the service.
        budget: of the bytes that requests hold; None: each is bounded by itself only.
    """

    def __init__(
        self,
        app: HttpApp,
        *,
        host: str,
        port: int,
        grace_s: float,
        limits: HttpLimits | None = None,
        tls: ServerTls | None = None,
        shares_port: bool = False,
        budget: ByteBudget | None = None,
    ) -> None:
        self._app = app
        self._grace_s = grace_s
        self._context = following_ssl_context(tls, "http/1.1") if tls else None
        self._listener = HttpListener(
            app.answer, limits or HttpLimits(), max_body_bytes=app.max_body_bytes, budget=budget, error=_error
        )
        self._stack = AsyncExitStack()
        self._socket = listen(host, port, shares_port=shares_port)
        self.port: int = self._socket.getsockname()[1]

    @property
    def n_connections(self) -> int:
        """Those that are open."""
        return len(self._listener.connections)

    async def __aenter__(self) -> HttpFace:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Http1Connection(self._listener),
            sock=self._socket,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._context else None,
            backlog=BACKLOG,
        )
        await self._stack.enter_async_context(background(self._listener.keep_ticking()))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def drain(self, *, delay_s: float) -> None:
        """Say "not ready", serve on for ``delay_s``, then refuse new calls and let those in flight finish."""
        self._app.is_draining = True
        await asyncio.sleep(delay_s)
        await self._stop()

    async def _stop(self) -> None:
        self._server.close()
        self._listener.drain()
        await self._listener.connections.wait_closed(self._grace_s)
        self._listener.connections.abort()
        await self._stack.aclose()


def _error(status: int, message: str) -> HttpResponse:
    """The body of a request's error that its connection found, in the form of the others."""
    content = {"error": message, "reason": Internal.reason} if status == 500 else {"error": message}
    return HttpResponse(status, msgspec.json.encode(content))
