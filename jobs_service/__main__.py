"""``python -m jobs_service``: the process, from settings to shutdown."""

from __future__ import annotations

import os

from jobs_service import build
from jobs_service.face import JobsFace
from jobs_service.metrics import STAGE, JobMetrics
from jobs_service.settings import JobsSettings, check
from splitserve.remote.inference import RemoteInference
from splitserve.server import lifecycle, settings
from splitserve.server.admin import open_admin

NO_HEDGE_S = 1e6
"""A job that takes long is not sent twice."""


async def serve(config: JobsSettings) -> None:
    os.nice(config.nice)
    async with lifecycle.ServiceProcess(config, "jobs") as process:
        proxy = await process.enter_async_context(
            RemoteInference(
                config.proxy_target,
                stage="proxy",
                max_message_bytes=config.max_message_bytes,
                tls=config.next_tls,
                token=config.proxy_token,
                hedge_after_s=NO_HEDGE_S,
            )
        )
        queue = await process.enter_async_context(build(proxy, config))
        metrics = await open_admin(process, config, queue.not_ready_reason)
        metrics.add_part(STAGE, JobMetrics(queue))
        face = await process.enter_async_context(JobsFace(queue, config.grpc_config, config.byte_budget()))
        await process.serve(face)


def read() -> JobsSettings:
    """The settings from the environment."""
    config = settings.read(JobsSettings)
    check(config)
    return config


if __name__ == "__main__":
    lifecycle.run(serve, read, service="jobs")
