"""Both faces of the proxy, REST and gRPC, started, drained and stopped as one. Split and fused serving show the same ones."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType

from proxy.http_app import RETRY_AFTER_S, HttpApp
from proxy.http_server import HttpFace
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve import __version__, oip
from splitserve.oip import ServerMetadata
from splitserve.server.grpc_face import GrpcFace


class Faces:
    """Listens on both ports while entered."""

    def __init__(self, service: ProxyService, config: ProxySettings) -> None:
        extensions = ("binary_tensor_data", *oip.extensions(allow_control=config.allow_repository_control))
        metadata = ServerMetadata("splitserve", __version__, extensions)
        self._config = config
        self._stack = AsyncExitStack()
        app = HttpApp(
            service,
            metadata=metadata,
            max_body_bytes=config.max_message_bytes,
            default_timeout_s=config.default_timeout_s,
            max_timeout_s=config.max_timeout_s,
            allow_control=config.allow_repository_control,
        )
        self.http = HttpFace(app, host=config.host, port=config.http_port, grace_s=config.grace_s)
        self.grpc = GrpcFace(
            service,
            stage="proxy",
            address=f"{config.host}:{config.grpc_port}",
            metadata=metadata,
            max_message_bytes=config.max_message_bytes,
            default_timeout_s=config.default_timeout_s,
            max_timeout_s=config.max_timeout_s,
            retry_after_s=RETRY_AFTER_S,
            allow_control=config.allow_repository_control,
            statistics=service.statistics,
        )

    async def __aenter__(self) -> Faces:
        await self._stack.enter_async_context(self.http)
        await self._stack.enter_async_context(self.grpc)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def drain(self) -> None:
        """Say "not ready", refuse new calls after the delay, let those in flight finish."""
        delay_s = self._config.drain_delay_s
        await asyncio.gather(self.http.drain(delay_s=delay_s), self.grpc.drain(delay_s=delay_s, grace_s=self._config.grace_s))
