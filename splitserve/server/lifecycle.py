"""Start and stop of a service process: one event loop, one stop signal, background work that ends with its owner."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import structlog

from splitserve.catalogue import STILL_LOADING
from splitserve.server import logs, workers
from splitserve.telemetry.export import open_tracing

if TYPE_CHECKING:
    from splitserve.server.settings import ServiceSettings

S = TypeVar("S", bound="ServiceSettings")

_MIB = 1024 * 1024

WAITING_INTERVAL_S = 0.1
"""Refresh interval of a service that is not ready yet."""

FIRST_LOAD_TIMEOUT_S, FIRST_LOAD_INTERVAL_S = 2.0, 0.02
"""How long a service that faces clients waits for its models before it opens its ports, and how often it checks."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


class StopSignal:
    """Waits for SIGTERM or SIGINT. A second one ends the process at once."""

    def __init__(self) -> None:
        self._came = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    async def wait(self) -> None:
        """Return at the first signal."""
        await self._came.wait()

    def _on_signal(self, number: int) -> None:
        if self._came.is_set():
            os._exit(128 + number)
        self._came.set()


@contextlib.asynccontextmanager
async def background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines in the background of the ``with`` block; leaving it cancels them."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Face(Protocol):
    """The servers of a service process."""

    @property
    def ports(self) -> Mapping[str, int]:
        """Where it listens, by name."""
        ...

    async def drain(self) -> None:
        """Refuse new calls and let those in flight finish."""
        ...


class ServiceProcess(contextlib.AsyncExitStack):
    """A service process from its first log line to its last. What is entered is exited in reverse order.

    Args:
        config: its settings.
        name: of the service, in its logs.
    """

    def __init__(self, config: ServiceSettings, name: str) -> None:
        super().__init__()
        logs.configure(level=config.log_level, format=config.log_format, service=name, requests=config.log_requests)
        self._log = structlog.get_logger()
        self._stop = StopSignal()
        self.spans = open_tracing(name)
        """Exports them, if requests are traced."""
        if self.spans is not None:
            self.push_async_callback(self.spans.close)
        self.is_draining = False
        self.admin_ports: Mapping[str, int] = {}
        """Where its admin listener is, by name; empty: it has none of its own."""

    async def start(self, *work: Coroutine[Any, Any, None], why_not_ready: Callable[[], Awaitable[str]]) -> None:
        """Begin background work, and wait until everything that the service finds has been loaded or refused.

        Balancers without health checks send requests as soon as a port is open: the models should be known by then. Loading
        that takes longer than `FIRST_LOAD_TIMEOUT_S` is not waited for: clients then learn why the service is not ready.
        """
        await self.enter_async_context(background(*work))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOAD_TIMEOUT_S):
                while STILL_LOADING in await why_not_ready():  # noqa: ASYNC110, in split serving another process knows
                    await asyncio.sleep(FIRST_LOAD_INTERVAL_S)

    async def serve(self, face: Face, *work: Coroutine[Any, Any, None]) -> None:
        """Run until SIGTERM or SIGINT, with background work, then drain.

        Args:
            face: listening already.
            work: runs in the background until the end.
        """
        # Requests are accepted at these ports: `http_port` of the proxy, `grpc_port` of every service.
        self._log.info("listening", **face.ports, **self.admin_ports)
        await self.enter_async_context(background(*work))
        await self._stop.wait()
        # SIGTERM or SIGINT: requests in flight are still answered.
        self._log.info("draining")
        self.is_draining = True
        await face.drain()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        is_handled = await super().__aexit__(kind, error, trace)
        if error is None:
            # The process has released its resources and exits.
            self._log.info("stopped")
        return is_handled


class Refreshing(Protocol):
    """Something that polls."""

    async def refresh(self) -> None: ...


async def keep_refreshing(
    what: Refreshing, *, interval_s: float, why_waiting: Callable[[], Awaitable[str]] | None = None
) -> None:
    """Refresh every ``interval_s`` seconds, until cancelled. A failure is logged and retried in the next round.

    Args:
        what: to refresh.
        interval_s: between rounds.
        why_waiting: why it is not ready, "" if it is; until then rounds follow every `WAITING_INTERVAL_S`.
    """
    log = structlog.get_logger()
    while True:
        is_waiting = False
        try:
            await what.refresh()
            is_waiting = why_waiting is not None and bool(await why_waiting())
        except Exception:
            # An unexpected error in a periodic check; the next round follows.
            log.exception("refresh failed", of=type(what).__name__)
        await asyncio.sleep(min(interval_s, WAITING_INTERVAL_S) if is_waiting else interval_s)


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next large message: page faults cost more than the copies.

    Source: mallopt(3). A libc without it is left as it is.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (_M_MMAP_THRESHOLD, 32 * _MIB),
            (_M_TRIM_THRESHOLD, 256 * _MIB),
            (_M_TOP_PAD, 16 * _MIB),
            (_M_ARENA_MAX, 2),
        ):
            mallopt(option, value)


def run(main: Callable[[S], Awaitable[None]], read: Callable[[], S], *, service: str) -> None:
    """Run a service, in several processes if the settings or the option ``--workers`` ask for it.

    Args:
        main: runs the service, with its settings.
        read: reads the settings.
        service: its name in logs; in capitals, the prefix of its settings.
    """
    workers.take_option(sys.argv, f"{service.upper()}_WORKERS")
    config = read()
    if config.workers == 1:
        _run(main(config))
        return
    logs.configure(level=config.log_level, format=config.log_format, service=service, requests=config.log_requests)
    workers.check(config.ports)
    from splitserve.server.admin import listen_for_admin  # these import this module
    from splitserve.server.worker_admin import serve_workers_admin

    listening = listen_for_admin(config)
    with tempfile.TemporaryDirectory(prefix="splitserve-") as sockets:  # for this user only
        admin = None if listening is None else lambda: _run(serve_workers_admin(config, service, sockets, listening))
        os.environ[workers.SOCKETS_VARIABLE] = sockets
        workers.supervise(config.workers, lambda: _run(main(config)), admin)


def _run(main: Awaitable[None]) -> None:
    """On uvloop, except on Windows."""
    # Requests make many objects and no cycles: a collection every 700 objects costs a tenth of a request.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    _keep_memory()
    if sys.platform == "win32":
        asyncio.run(_awaited(main))
        return
    import uvloop

    uvloop.run(_awaited(main))


async def _awaited(main: Awaitable[None]) -> None:
    await main
