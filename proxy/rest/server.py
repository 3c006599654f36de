"""The HTTP server in front of the REST face: listens, drains, stops."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType

import msgspec

from proxy.rest.app import RestApp
from splitserve.errors import Internal
from splitserve.server.lifecycle import background
from splitserve.server.tls import following_ssl_context
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.connection import Http1Connection
from splitserve.wire.http1.listener import HttpListener
from splitserve.wire.http1.messages import HttpResponse
from splitserve.wire.listening import Acceptor, listen


class RestFace:
    """Listens while entered.

    Args:
        app: handles requests, and has the configuration.
        budget: of the bytes that requests hold; None: unlimited.
    """

    def __init__(self, app: RestApp, *, budget: ByteBudget | None = None) -> None:
        self._app = app
        config = self._config = app.config
        self._listener = HttpListener(
            app.answer, config.connection_limits, max_body_bytes=config.max_body_bytes, budget=budget, error=_error
        )
        self._stack = AsyncExitStack()
        socket = listen(config.host, config.port, shares_port=config.shares_port)
        context = following_ssl_context(config.tls, "http/1.1") if config.tls else None
        self._acceptor = Acceptor(socket, lambda: Http1Connection(self._listener), context)
        self.port: int = socket.getsockname()[1]

    @property
    def n_connections(self) -> int:
        """Those that are open."""
        return len(self._listener.connections)

    async def __aenter__(self) -> RestFace:
        self._acceptor.start()
        await self._stack.enter_async_context(background(self._listener.keep_ticking()))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def drain(self) -> None:
        """Say "not ready", serve on for the delay, then refuse new calls and let those in flight finish.

        Responses say ``connection: close`` from the beginning of the delay: clients and balancers that keep connections leave
        them by themselves, rather than send a request on one that is being closed.
        """
        self._app.is_draining = self._listener.is_draining = True
        await asyncio.sleep(self._config.drain_delay_s)
        await self._stop()

    async def _stop(self) -> None:
        await self._acceptor.stop()
        self._listener.drain()
        await self._listener.connections.wait_closed(self._config.grace_s)
        await self._listener.connections.abort()
        await self._stack.aclose()


def _error(status: int, message: str) -> HttpResponse:
    """The body of a request's error that its connection found, in the form of the others."""
    content = {"error": message, "reason": Internal.reason} if status == 500 else {"error": message}
    return HttpResponse(status, msgspec.json.encode(content))
