"""``python -m proxy``: the process, from settings to shutdown."""

from __future__ import annotations

import asyncio
import contextlib

from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.remote.inference import RemoteInference
from splitserve.server import lifecycle, settings

FIRST_REFRESH_TIMEOUT_S = 2.0
"""The ports are opened after this even if preprocess has not answered: clients then learn why the proxy is not ready."""


async def serve(config: ProxySettings) -> None:
    async with lifecycle.ServiceProcess(config, "proxy") as process:
        preprocess = await process.enter_async_context(
            RemoteInference(
                config.preprocess_target, stage="preprocess", max_message_bytes=config.max_message_bytes, tls=config.next_tls
            )
        )
        service = ProxyService(
            preprocess,
            limits=config.batch_limits,
            n_replicas=lambda: preprocess.n_replicas,
            indexes=preprocess.indexes,
            max_message_bytes=config.max_message_bytes,
        )
        # Balancers without health checks send calls as soon as a port is open: the models should be known by then.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.refresh(), FIRST_REFRESH_TIMEOUT_S)
        faces = await process.enter_async_context(Faces(service, config))
        await process.serve(
            faces,
            lifecycle.keep_refreshing(service, interval_s=config.refresh_interval_s, why_waiting=service.not_ready_reason),
        )


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(ProxySettings), service="proxy")
