"""A server's health follows what its service says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from structlog.testing import capture_logs

from splitserve.server.health import Health, Readiness

SERVICE = "example.Service"


class Example:
    """A service whose state is set."""

    def __init__(self) -> None:
        self.reason = "still loading"
        self.is_loaded = False

    async def not_ready_reason(self) -> str:
        return self.reason


async def is_serving(health: Health, service: str) -> bool:
    check = health.methods["/grpc.health.v1.Health/Check"].unary
    assert check is not None
    answer = await check(health_pb2.HealthCheckRequest(service=service).SerializeToString(), None)  # type: ignore[arg-type]
    return health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_changes_are_logged_once_and_draining_overrides_the_service() -> None:
    """Each reason is logged when it changes. Calls are accepted before the service is ready, and not while it drains."""
    service, health = Example(), Health()
    readiness = Readiness(health, SERVICE, service.not_ready_reason, accepts_calls=lambda: service.is_loaded)
    seen = []
    with capture_logs() as logs:
        readiness.start()
        await until(lambda: len(logs) == 1)
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        service.reason, service.is_loaded = "no models found", True
        await until(lambda: len(logs) == 2)
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        service.reason = ""
        await until(lambda: len(logs) == 3)
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        await readiness.drain()
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        readiness.stop()

    assert seen == [(False, False), (False, True), (True, True), (False, False)]
    told = [(log["event"], log.get("reason", "")) for log in logs]
    assert told == [("not ready", "still loading"), ("not ready", "no models found"), ("ready", ""), ("not ready", "draining")]
