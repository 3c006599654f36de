"""The HTTP server in front of the REST face: uvicorn, with start and stop in our hands."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from functools import partial
from types import TracebackType

import uvicorn

from proxy.bounded_bodies import BoundedBodies
from proxy.http_app import HttpApp
from proxy.http_protocol import HttpLimits, LimitedProtocol
from splitserve.server.byte_budget import ByteBudget
from splitserve.server.tls import HANDSHAKE_TIMEOUT_S, ServerTls, following_ssl_context

_BACKLOG = 2048


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, limits: HttpLimits, context: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()
        self._limits = limits
        self._context = context

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's, not the server's."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with limits for each connection and for TLS handshakes."""
        protocol = partial(LimitedProtocol, config=self.config, server_state=self.server_state, app_state={}, limits=self._limits)
        timeout_s = HANDSHAKE_TIMEOUT_S if self._context else None
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                protocol, sock=each, ssl=self._context, ssl_handshake_timeout=timeout_s, backlog=self.config.backlog
            )
            for each in sockets or ()
        ]
        self.started = True
        self.is_listening.set()


class HttpFace:
    """Listens while entered.

    Args:
        app: the REST face.
        host: address to listen on.
        port: 0 takes a free one, see `port`.
        grace_s: how long calls in flight get once `drain` refuses new ones.
        limits: of connections.
        tls: files of the listener; None: plain text.
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
        budget: ByteBudget | None = None,
    ) -> None:
        limits = limits or HttpLimits()
        self._app = app
        config = uvicorn.Config(
            BoundedBodies(app, budget) if budget else app,
            http="httptools",
            proxy_headers=False,
            loop="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            log_level="error",  # what a client does wrong is answered, not logged: lines are cheap to provoke
            backlog=_BACKLOG,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        self._server = _Server(config, limits, following_ssl_context(tls) if tls else None)
        try:
            self._socket = socket.create_server((host, port), backlog=_BACKLOG)
        except OSError as error:
            raise SystemExit(f"can not listen on {host}:{port}: {error.strerror}") from None
        self.port: int = self._socket.getsockname()[1]
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HttpFace:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.is_listening.wait()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def drain(self, *, delay_s: float) -> None:
        """Say "not ready", serve on for ``delay_s``, then refuse new calls and let those in flight finish."""
        self._app.is_draining = True
        await asyncio.sleep(delay_s)
        await self._stop()

    async def _stop(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
