"""grpc.health.v1, which orchestrators, load balancers and clients use.

Source: gRPC, doc/health-checking.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from splitserve.wire.grpc.call import MethodHandler, ServerCall
from splitserve.wire.grpc.messages import CallError

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


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


def _service_in(data: bytes) -> str:
    try:
        service: str = health_pb2.HealthCheckRequest.FromString(data).service
    except DecodeError:
        raise CallError("INVALID_ARGUMENT", "the request is not a grpc.health.v1.HealthCheckRequest") from None
    return service
