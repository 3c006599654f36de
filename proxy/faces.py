"""Both faces of the proxy, REST and gRPC, started, drained and stopped together. Split and fused serving use the same ones."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import structlog

from proxy.guard import Guard
from proxy.jobs import ProxyJobs
from proxy.rest.app import RestApp
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.jobs.service import Jobs
from splitserve.server import lifecycle
from splitserve.server.grpc_face import GrpcFace
from splitserve.telemetry.requests import RequestRecorder
from splitserve.wire.byte_budget import ByteBudget

if TYPE_CHECKING:
    from proxy.auth import BearerAuthenticator


class Faces:
    """Listens on both ports while entered.

    Args:
        service: of the proxy.
        config: its settings.
        jobs: the jobs service; None: jobs are not supported.
        authenticator: of callers, if there is one already; by default the one that is configured.
        budget: of the bytes that requests hold; by default that of the settings.
        recorder: counts inferences.
    """

    def __init__(
        self,
        service: ProxyService,
        config: ProxySettings,
        jobs: Jobs | None = None,
        authenticator: BearerAuthenticator | None = None,
        *,
        budget: ByteBudget | None = None,
        recorder: RequestRecorder | None = None,
    ) -> None:
        self._config = config
        self._stack = AsyncExitStack()
        self.authenticator = authenticator or authenticator_of(config)
        served = Guard(service, self.authenticator.models_of) if self.authenticator else service
        budget = budget or config.byte_budget()
        self._jobs = ProxyJobs(
            served, jobs, config.limits, is_authenticated=self.authenticator is not None, is_local=config.is_local
        )
        app = RestApp(served, config.rest_config, authenticator=self.authenticator, jobs=self._jobs, recorder=recorder)
        self.http = RestFace(app, budget=budget)
        self.grpc = GrpcFace(
            served,
            config.grpc_config,
            statistics=service.statistics,
            authenticator=self.authenticator,
            budget=budget,
            more=self._jobs.methods,
            recorder=recorder,
        )

    @property
    def ports(self) -> dict[str, int]:
        """The ports, by name."""
        return {"http_port": self.http.port, **self.grpc.ports}

    async def __aenter__(self) -> Faces:
        await self._stack.enter_async_context(self.http)
        await self._stack.enter_async_context(self.grpc)
        if not (self._config.is_local or self.authenticator or self._config.tls_client_ca_file):
            # The proxy listens beyond loopback, without an authorization file or mutual TLS.
            structlog.get_logger().warning("authentication not configured", host=self._config.host, see="docs/security.md")
        if self.authenticator:
            await self._stack.enter_async_context(
                lifecycle.background(lifecycle.keep_refreshing(self.authenticator, interval_s=self._config.refresh_interval_s))
            )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def drain(self) -> None:
        """Report "not ready", refuse new calls after the delay, and let those in flight finish."""
        self._jobs.drain()
        await asyncio.gather(self.http.drain(), self.grpc.drain())


def authenticator_of(config: ProxySettings) -> BearerAuthenticator | None:
    """What authenticates callers; None: nothing is configured."""
    if not config.auth_file:
        return None
    from proxy.auth import BearerAuthenticator  # imports cryptography, which is needed here only

    return BearerAuthenticator(config.auth_file)
