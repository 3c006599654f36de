"""``python -m proxy``: its life, from settings to stop."""

from __future__ import annotations

from contextlib import AsyncExitStack

import structlog

from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.remote.inference import RemoteInference
from splitserve.server import lifecycle, logs, settings


async def serve(config: ProxySettings) -> None:
    logs.configure(level=config.log_level, format=config.log_format, service="proxy", requests=config.log_requests)
    log = structlog.get_logger()
    stop = lifecycle.StopSignal()
    async with AsyncExitStack() as stack:
        preprocess = await stack.enter_async_context(
            RemoteInference(
                config.preprocess_target,
                stage="preprocess",
                max_message_bytes=config.max_message_bytes,
                tls=config.next_tls,
            )
        )
        service = ProxyService(preprocess, limits=config.batch_limits, n_replicas=lambda: preprocess.n_replicas)
        faces = await stack.enter_async_context(Faces(service, config))
        log.info("listening", http_port=faces.http.port, grpc_port=faces.grpc.port)
        await stack.enter_async_context(
            lifecycle.background(
                lifecycle.keep_refreshing(service, interval_s=config.refresh_interval_s, why_waiting=service.not_ready_reason)
            )
        )
        await stop.wait()
        log.info("draining")
        await faces.drain()
    log.info("stopped")


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(ProxySettings), service="proxy")
