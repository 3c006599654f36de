"""Start and stop of a service process: one event loop, one stop signal, background work that ends with its owner."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import structlog

from splitserve.server import logs, workers

if TYPE_CHECKING:
    from splitserve.server.settings import ServiceSettings

S = TypeVar("S", bound="ServiceSettings")

_MIB = 1024 * 1024

WAITING_INTERVAL_S = 0.1
"""How often a service that cannot serve yet looks whether it can."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


class StopSignal:
    """SIGTERM or SIGINT, as something to wait for. A second one ends the process at once."""

    def __init__(self) -> None:
        self._came = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    async def wait(self) -> None:
        """Until the first signal."""
        await self._came.wait()

    def _on_signal(self, number: int) -> None:
        if self._came.is_set():
            os._exit(128 + number)
        self._came.set()


@contextlib.asynccontextmanager
async def background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these beside what is inside the ``with``; they are cancelled when it is left."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Face(Protocol):
    """What a process listens with."""

    @property
    def ports(self) -> Mapping[str, int]:
        """Where it listens, by name."""
        ...

    async def drain(self) -> None:
        """Refuse new calls, let those in flight finish."""
        ...


class ServiceProcess(contextlib.AsyncExitStack):
    """The life of a service process, between its first log line and its last: what is entered is left in reverse order.

    Args:
        config: its settings.
        name: of the service, in its logs.
    """

    def __init__(self, config: ServiceSettings, name: str) -> None:
        super().__init__()
        logs.configure(level=config.log_level, format=config.log_format, service=name, requests=config.log_requests)
        self._log = structlog.get_logger()
        self._stop = StopSignal()

    async def serve(self, face: Face, *work: Coroutine[Any, Any, None]) -> None:
        """Do the background work until the process is told to stop, then drain the face, which is listening."""
        # Requests are taken at these ports: `http_port` of the proxy, `grpc_port` of every service.
        self._log.info("listening", **face.ports)
        await self.enter_async_context(background(*work))
        await self._stop.wait()
        # SIGTERM or SIGINT: requests in flight are still answered.
        self._log.info("draining")
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
    """Something that follows the outside world by looking again and again."""

    async def refresh(self) -> None: ...


async def keep_refreshing(
    what: Refreshing, *, interval_s: float, why_waiting: Callable[[], Awaitable[str]] | None = None
) -> None:
    """Refresh now and then every ``interval_s`` seconds, until cancelled. A failure is logged and the next round tries again.

    Args:
        what: is refreshed.
        interval_s: between two rounds.
        why_waiting: what has to come before it can serve, "" when it can; until then rounds follow each other sooner.
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
    """Have glibc keep freed memory for the next large message: fresh pages cost more than the copies that they are for.

    Source: mallopt(3). Elsewhere there is no mallopt, and nothing is done.
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
    """Run a service, in several processes if its settings or the option ``--workers`` say so.

    Args:
        main: its life, with these settings.
        read: gives its settings.
        service: its name, in logs and, in capitals, in front of its settings.
    """
    workers.take_option(sys.argv, f"{service.upper()}_WORKERS")
    config = read()
    if config.workers == 1:
        _run(main(config))
        return
    logs.configure(level=config.log_level, format=config.log_format, service=service, requests=config.log_requests)
    workers.watch_over(config.workers, lambda: _run(main(config)), config.ports)


def _run(main: Awaitable[None]) -> None:
    """On the fastest event loop that there is here."""
    # Requests make many objects and no cycles: looking for those every 700 objects costs a tenth of a request.
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
