"""The HTTP server in front of the REST face: uvicorn, with start and stop in our hands."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import TracebackType

import uvicorn

from proxy.http_app import HttpApp

_BACKLOG = 2048


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's, not the server's."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


class HttpFace:
    """Listens while entered.

    Args:
        app: the REST face.
        host: address to listen on.
        port: 0 takes a free one, see `port`.
        grace_s: how long calls in flight get once `drain` refuses new ones.
    """

    def __init__(self, app: HttpApp, *, host: str, port: int, grace_s: float) -> None:
        self._app = app
        config = uvicorn.Config(
            app,
            http="httptools",
            loop="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        self._server = _Server(config)
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
