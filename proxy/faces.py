"""Both faces of the proxy, REST and gRPC, started, drained and stopped as one. Split and fused serving show the same ones."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import structlog

from proxy.guard import Guard
from proxy.rest.app import RETRY_AFTER_S, HttpApp
from proxy.rest.server import HttpFace
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve import __version__
from splitserve.oip import messages
from splitserve.oip.messages import ServerMetadata
from splitserve.server import lifecycle
from splitserve.server.grpc_face import GrpcFace

if TYPE_CHECKING:
    from proxy.auth import BearerAuthenticator


class Faces:
    """Listens on both ports while entered."""

    def __init__(self, service: ProxyService, config: ProxySettings) -> None:
        extensions = ("binary_tensor_data", *messages.extensions(allow_control=config.allow_repository_control))
        metadata = ServerMetadata("splitserve", __version__, extensions)
        self._config = config
        self._stack = AsyncExitStack()
        self.authenticator = _authenticator(config)
        served = Guard(service) if self.authenticator else service
        app = HttpApp(
            served,
            metadata=metadata,
            max_body_bytes=config.max_message_bytes,
            default_timeout_s=config.default_timeout_s,
            max_timeout_s=config.max_timeout_s,
            allow_control=config.allow_repository_control,
            limits=config.limits,
            authenticator=self.authenticator,
        )
        budget = config.byte_budget()
        self.http = HttpFace(
            app,
            host=config.host,
            port=config.http_port,
            grace_s=config.grace_s,
            limits=config.http_limits,
            tls=config.tls,
            shares_port=config.shares_ports,
            budget=budget,
        )
        self.grpc = GrpcFace(
            served,
            stage="proxy",
            address=f"{config.host}:{config.grpc_port}",
            metadata=metadata,
            max_message_bytes=config.max_message_bytes,
            default_timeout_s=config.default_timeout_s,
            max_timeout_s=config.max_timeout_s,
            retry_after_s=RETRY_AFTER_S,
            allow_control=config.allow_repository_control,
            statistics=service.statistics,
            tls=config.tls,
            limits=config.limits,
            authenticator=self.authenticator,
            budget=budget,
            connections=config.grpc_limits,
            shares_port=config.shares_ports,
        )

    async def __aenter__(self) -> Faces:
        await self._stack.enter_async_context(self.http)
        await self._stack.enter_async_context(self.grpc)
        is_local = self._config.host in ("127.0.0.1", "::1", "localhost")
        if not (is_local or self.authenticator or self._config.tls_client_ca_file):
            structlog.get_logger().warning(
                "anyone who reaches this host may call", host=self._config.host, see="docs/security.md"
            )
        if self.authenticator:
            await self._stack.enter_async_context(
                lifecycle.background(lifecycle.keep_refreshing(self.authenticator, interval_s=self._config.refresh_interval_s))
            )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def drain(self) -> None:
        """Say "not ready", refuse new calls after the delay, let those in flight finish."""
        delay_s = self._config.drain_delay_s
        await asyncio.gather(self.http.drain(delay_s=delay_s), self.grpc.drain(delay_s=delay_s, grace_s=self._config.grace_s))


def _authenticator(config: ProxySettings) -> BearerAuthenticator | None:
    if not config.auth_file:
        return None
    from proxy.auth import BearerAuthenticator  # brings cryptography with it, which nobody else needs

    return BearerAuthenticator(config.auth_file)
