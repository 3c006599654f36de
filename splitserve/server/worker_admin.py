"""The admin port of a service with several workers: a process of its own, which asks them on sockets of theirs.

1. Each worker is asked at the same time, for at most `ASK_TIMEOUT_S`. One that does not answer is shown as down.
2. Counters and histograms are added, and a gauge has the worker's index as a label.
3. A worker that was started again has another generation: what the one before had counted, as of its last answer, stays in the
   sums, so that they do not fall. What it counted after that answer is lost. Its gauges go.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import structlog

from splitserve.server import logs
from splitserve.server.admin import AdminListener, SharedLogLevel, WorkerAnswer, app_of, beats_of
from splitserve.server.lifecycle import StopSignal
from splitserve.server.settings import ServiceSettings
from splitserve.telemetry.families import WORKER_BEAT_AGE, WORKER_UP, families_with
from splitserve.telemetry.recorders import LATENCY_BOUNDS
from splitserve.telemetry.registry import Family, Snapshot, added, sums_of

ASK_TIMEOUT_S = 0.5


class Workers:
    """Implements `splitserve.server.admin.Administered` for all workers of a service.

    Args:
        sockets: the folder of their sockets.
        n_workers: how many there are.
        timeout_s: for the answer of each.
        latency_bounds: of the durations of requests.
    """

    def __init__(
        self,
        sockets: Path,
        n_workers: int,
        *,
        timeout_s: float = ASK_TIMEOUT_S,
        latency_bounds: tuple[float, ...] = LATENCY_BOUNDS,
    ) -> None:
        self._sockets = sockets
        self._n_workers = n_workers
        self._timeout_s = timeout_s
        self._families = {family.name: family for family in families_with(latency_bounds)}
        self.log_level = SharedLogLevel(sockets)
        self._turn = asyncio.Lock()
        self._last: dict[int, WorkerAnswer] = {}
        self._ended: Snapshot = {}
        """The sums of generations that have ended."""

    @property
    def families(self) -> Mapping[str, Family]:
        return self._families

    async def snapshot(self) -> Snapshot:
        async with self._turn:  # an answer of an earlier generation is not taken after one of a later generation
            return await self._snapshot()

    async def _snapshot(self) -> Snapshot:
        answers = await asyncio.gather(*(self._answer(index) for index in range(self._n_workers)))
        present = []
        for index, answer in enumerate(answers):
            last = self._last.get(index)
            if answer is not None:
                if last is not None and last.generation != answer.generation:
                    self._ended = added([("", self._ended), ("", self._sums(last))], self._families)
                self._last[index] = answer
                present.append((str(index), dict(answer.snapshot)))
            elif last is not None:
                present.append((str(index), self._sums(last)))
        whole = added([("", self._ended), *present], self._families)
        whole[WORKER_UP.name] = {(str(index),): int(answer is not None) for index, answer in enumerate(answers)}
        ages_s = {(str(index),): beats_of(self._sockets, index).age_s() for index in range(self._n_workers)}
        whole[WORKER_BEAT_AGE.name] = {labels: age_s for labels, age_s in ages_s.items() if age_s is not None}
        return whole

    async def not_ready_reason(self) -> str:
        answers = await asyncio.gather(*(self._get(index, "/readyz") for index in range(self._n_workers)))
        reasons = [_reason(body) for body in answers if body is not None]
        if not reasons:
            return "no worker answers"
        return "" if "" in reasons else reasons[0]

    async def set_log_level(self, level: logs.Level) -> None:
        self.log_level.set(level)
        await asyncio.gather(*(self._get(index, f"/set-log-level/{level}") for index in range(self._n_workers)))

    def _sums(self, answer: WorkerAnswer) -> Snapshot:
        return sums_of(dict(answer.snapshot), self._families)

    async def _answer(self, index: int) -> WorkerAnswer | None:
        body = await self._get(index, "/snapshot")
        try:
            return None if body is None else msgspec.msgpack.decode(body, type=WorkerAnswer)
        except msgspec.DecodeError:
            return None

    async def _get(self, index: int, path: str) -> bytes | None:
        """The body of a worker's response, of whatever status; None: it does not answer in time."""
        writer = None
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._sockets / f"{index}.sock")
                writer.write(f"GET {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n".encode())
                _, end, body = (await reader.read()).partition(b"\r\n\r\n")
                return body if end else None
        except (OSError, TimeoutError):
            return None
        finally:
            if writer is not None:
                writer.close()


def _reason(body: bytes) -> str:
    """Why a worker is not ready, as its ``/readyz`` says; "" if it is."""
    try:
        reason: str = msgspec.json.decode(body, type=dict[str, Any]).get("reason", "")
    except msgspec.DecodeError:
        return "malformed answer"
    return reason


async def serve_workers_admin(config: ServiceSettings, service: str, sockets: str, listening: socket.socket) -> None:
    """Answer at the admin port for all workers, until SIGTERM or SIGINT.

    Args:
        config: the settings of the service.
        service: its name in logs.
        sockets: the folder of the workers' sockets.
        listening: the socket of the admin port, bound before there were workers, so that a port that is taken stops the service.
    """
    logs.configure(level=config.log_level, format=config.log_format, service=service, requests=config.log_requests)
    async with AsyncExitStack() as stack:
        stop = StopSignal()
        workers = Workers(Path(sockets), config.workers, latency_bounds=config.latency_bounds)
        workers.log_level.follow()  # this process may have been started again
        await stack.enter_async_context(AdminListener(app_of(config, workers), listening, config))
        # Where the process answers that speaks for all workers.
        structlog.get_logger().info("admin listening", admin_port=listening.getsockname()[1])
        await stop.wait()
