"""grpc.health.v1, which orchestrators, load balancers and clients use.

Source: gRPC, doc/health-checking.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from splitserve.wire.grpc.call import MethodHandler, ServerCall
from splitserve.wire.grpc.messages import CallError

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

HEALTH_INTERVAL_S = 0.2
"""How often a service is asked whether it is ready."""


class Health:
    """The health of the services of a server."""

    def __init__(self) -> None:
        self._is_serving: dict[str, bool] = {"": False}
        self._changed = asyncio.Event()
        self._is_over = False

    @property
    def methods(self) -> Mapping[str, MethodHandler]:
        """The handlers of the protocol's methods, by path."""
        return {
            f"/{SERVICE}/Check": MethodHandler(unary=self._check),
            f"/{SERVICE}/Watch": MethodHandler(streaming=self._watch),
        }

    def set(self, service: str, is_serving: bool) -> None:
        """Set the health of a service and notify watchers."""
        if self._is_serving.get(service) is not is_serving:
            self._is_serving[service] = is_serving
            self._wake()

    def end(self) -> None:
        """End all watches."""
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _check(self, data: bytes, call: ServerCall) -> bytes:
        service = _service_in(data)
        if service not in self._is_serving:
            raise CallError("NOT_FOUND", f'unknown service "{service[:64]}"')
        answer: bytes = self._answer(service).SerializeToString()
        return answer

    async def _watch(self, call: ServerCall) -> None:
        service = _service_in(await call.read() or b"")
        sent: bytes | None = None
        while True:
            changed = self._changed
            now = self._answer(service).SerializeToString()
            if now != sent:
                await call.write(now)
                sent = now
            if self._is_over:
                return
            await changed.wait()

    def _answer(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if service not in self._is_serving:
            return response(status=response.SERVICE_UNKNOWN)
        return response(status=response.SERVING if self._is_serving[service] else response.NOT_SERVING)


class Readiness:
    """Keeps the health of a server up to date, and logs when it becomes ready or not ready, or the reason changes.

    Args:
        health: of the server: "" is whether it is ready.
        service: name of its gRPC service, whose health is whether calls are accepted.
        not_ready_reason: why it is not ready; "" if it is.
        accepts_calls: whether it accepts calls, ready or not.
    """

    def __init__(
        self,
        health: Health,
        service: str,
        not_ready_reason: Callable[[], Awaitable[str]],
        *,
        accepts_calls: Callable[[], bool] = lambda: True,
    ) -> None:
        self._health = health
        self._service = service
        self._not_ready_reason = not_ready_reason
        self._accepts_calls = accepts_calls
        self._log = structlog.get_logger()
        self._reported_reason: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self.is_draining = False

    def start(self) -> None:
        """Ask the service every `HEALTH_INTERVAL_S`."""
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Stop asking."""
        if self._watching is not None:
            self._watching.cancel()

    async def drain(self) -> None:
        """Report "not ready" from now on, whatever the service says."""
        self.is_draining = True
        await self._set_health()

    async def reason(self) -> str:
        """Why the server is not ready now; "" if it is."""
        return "draining" if self.is_draining else await self._not_ready_reason()

    async def _watch(self) -> None:
        while True:
            await self._set_health()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _set_health(self) -> None:
        reason = await self.reason()
        if reason != self._reported_reason:
            self._reported_reason = reason
            if reason:
                # Why the service cannot serve now; logged when the reason changes.
                self._log.info("not ready", reason=reason)
            else:
                # At least one model can be inferred; at the jobs service, jobs can be submitted.
                self._log.info("ready")
        self._health.set("", not reason)
        self._health.set(self._service, not self.is_draining and self._accepts_calls())


def _service_in(data: bytes) -> str:
    try:
        service: str = health_pb2.HealthCheckRequest.FromString(data).service
    except DecodeError:
        raise CallError("INVALID_ARGUMENT", "the request is not a grpc.health.v1.HealthCheckRequest") from None
    return service
