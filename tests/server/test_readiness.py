"""A server's health follows what its service says."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2
from structlog.testing import capture_logs

from splitserve.server.health import Health, Readiness

SERVICE = "example.Service"


class Example:
    """A service whose state is set."""

    def __init__(self) -> None:
        self.reason = "still loading"
        self.is_loaded = False
        self.n_asked = 0

    async def not_ready_reason(self) -> str:
        self.n_asked += 1
        return self.reason

    async def asked_twice(self) -> None:
        """Wait until the present state has been seen twice."""
        n_asked = self.n_asked
        async with asyncio.timeout(30):
            while self.n_asked < n_asked + 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def is_serving(health: Health, service: str) -> bool:
    check = health.methods["/grpc.health.v1.Health/Check"].unary
    assert check is not None
    answer = await check(health_pb2.HealthCheckRequest(service=service).SerializeToString(), None)  # type: ignore[arg-type]
    return health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


async def test_changes_are_logged_once_and_draining_overrides_the_service() -> None:
    """Each reason is logged when it changes. Calls are accepted before the service is ready, and not while it drains."""
    service, health = Example(), Health()
    readiness = Readiness(health, SERVICE, service.not_ready_reason, accepts_calls=lambda: service.is_loaded)
    seen = []
    with capture_logs() as logs:
        readiness.start()
        await service.asked_twice()
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        service.reason, service.is_loaded = "no models found", True
        await service.asked_twice()
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        service.reason = ""
        await service.asked_twice()
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        await readiness.drain()
        seen.append((await is_serving(health, ""), await is_serving(health, SERVICE)))
        readiness.stop()

    assert seen == [(False, False), (False, True), (True, True), (False, False)]
    told = [(log["event"], log.get("reason", "")) for log in logs]
    assert told == [("not ready", "still loading"), ("not ready", "no models found"), ("ready", ""), ("not ready", "draining")]
