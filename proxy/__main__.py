"""``python -m proxy``: the process, from settings to shutdown."""

from __future__ import annotations

from proxy.faces import Faces
from proxy.remote_jobs import RemoteJobs
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.remote.inference import RemoteInference
from splitserve.server import lifecycle, settings
from splitserve.server.admin import open_admin
from splitserve.server.metrics import StageMetrics
from splitserve.telemetry.families import PROTOCOLS


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
        budget = config.byte_budget()
        metrics = await open_admin(process, config, service.not_ready_reason)
        requests = metrics.add(
            "proxy",
            StageMetrics("proxy", service, protocols=PROTOCOLS, batcher=service.batcher, budget=budget, next_stage=preprocess),
        )
        await process.start(
            lifecycle.keep_refreshing(service, interval_s=config.refresh_interval_s, why_waiting=service.not_ready_reason),
            why_not_ready=service.not_ready_reason,
        )
        jobs = await process.enter_async_context(_jobs(config)) if config.jobs_target else None
        await process.serve(await process.enter_async_context(Faces(service, config, jobs, budget=budget, recorder=requests)))


def _jobs(config: ProxySettings) -> RemoteJobs:
    return RemoteJobs(config.jobs_target, max_message_bytes=config.max_message_bytes, tls=config.next_tls)


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(ProxySettings), service="proxy")
