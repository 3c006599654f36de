"""``python -m fused_service``: the proxy's faces over preprocess and predict in one process.

Each stage reads the settings that it reads as a service; those of the connections between them have no effect. Jobs are part of
the process if ``JOBS_DIR`` or ``JOBS_DATABASE_URL`` is set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from predict_service.loading import predictor_store
from predict_service.service import PredictService
from predict_service.settings import PredictSettings
from preprocess_service.loading import preprocessor_store
from preprocess_service.service import PreprocessService
from preprocess_service.settings import PreprocessSettings
from proxy.faces import Faces, authenticator_of
from proxy.guard import JobsGuard
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.server import lifecycle, settings
from splitserve.server.admin import open_admin
from splitserve.server.lifecycle import keep_refreshing
from splitserve.server.metrics import CacheMetrics, StageMetrics
from splitserve.server.traced_stage import traced_stage
from splitserve.telemetry.families import PROTOCOLS

if TYPE_CHECKING:
    from fused_service.jobs import DrainingJobs


async def serve(config: ProxySettings) -> None:
    preprocess_config = settings.read(PreprocessSettings)
    predict_config = settings.read(PredictSettings)
    async with lifecycle.ServiceProcess(config, "fused") as process:
        predictors = predictor_store(predict_config)
        preprocessors = preprocessor_store(preprocess_config)
        n_threads = preprocess_config.n_threads + predict_config.n_threads
        executor = process.enter_context(ThreadPoolExecutor(n_threads, thread_name_prefix="compute"))
        predict = PredictService(
            predictors,
            executor,
            limits=predict_config.batch_limits,
            max_message_bytes=predict_config.max_message_bytes,
        )
        preprocess = PreprocessService(
            preprocessors,
            predict if process.spans is None else traced_stage(predict, "predict"),
            executor,
            max_message_bytes=preprocess_config.max_message_bytes,
            allow_unreleased_pairs=preprocess_config.allow_unreleased_pairs,
            predict_indexes=predict.indexes,
        )
        following = preprocess if process.spans is None else traced_stage(preprocess, "preprocess")
        service = ProxyService(following, limits=config.batch_limits, max_message_bytes=config.max_message_bytes)
        budget = config.byte_budget()
        metrics = await open_admin(process, config, service.not_ready_reason)
        requests = metrics.add(
            "proxy", StageMetrics("proxy", service, protocols=PROTOCOLS, batcher=service.batcher, budget=budget)
        )
        metrics.add(
            "preprocess",
            StageMetrics(
                "preprocess",
                preprocess,
                protocols=(),
                n_tried=preprocessors.n_tried,
                n_refused=preprocessors.n_refused,
                golden_errors=lambda: preprocess.golden_errors,
            ),
        )
        metrics.add(
            "predict",
            StageMetrics(
                "predict",
                predict,
                protocols=(),
                batcher=predict.batcher,
                n_tried=predictors.n_tried,
                n_refused=predictors.n_refused,
            ),
        )
        metrics.add_part("cache", CacheMetrics(predict_config.count_cached))
        process.push_async_callback(preprocess.close)
        for store in (predictors, preprocessors):
            process.callback(store.close)
        await process.start(
            *(keep_refreshing(part, interval_s=config.refresh_interval_s) for part in (predictors, preprocessors)),
            *(
                keep_refreshing(part, interval_s=config.refresh_interval_s, why_waiting=part.not_ready_reason)
                for part in (preprocess, service)
            ),
            why_not_ready=service.not_ready_reason,
        )
        authenticator = authenticator_of(config)
        jobs: DrainingJobs | None = None
        if _has_jobs():
            from fused_service.jobs import jobs_in  # needs the extra jobs
            from jobs_service.metrics import STAGE, JobMetrics
            from jobs_service.settings import JobsSettings

            inference = JobsGuard(service, authenticator.models_of) if authenticator else service
            jobs_config = settings.read(JobsSettings)
            jobs = await process.enter_async_context(jobs_in(inference, jobs_config, config.workers))
            metrics.add_part(STAGE, JobMetrics(jobs))
        faces = await process.enter_async_context(Faces(service, config, jobs, authenticator, budget=budget, recorder=requests))
        await process.serve(_FusedFace(faces, jobs, config.grace_s))


class _FusedFace:
    """Faces that are drained after the jobs: those in flight finish while their callers can still ask for them."""

    def __init__(self, faces: Faces, jobs: DrainingJobs | None, grace_s: float) -> None:
        self._faces = faces
        self._jobs = jobs
        self._grace_s = grace_s

    @property
    def ports(self) -> Mapping[str, int]:
        return self._faces.ports

    async def drain(self) -> None:
        if self._jobs is not None:
            await self._jobs.drain(self._grace_s)
        await self._faces.drain()


def _has_jobs() -> bool:
    return bool(os.environ.get("JOBS_DIR") or os.environ.get("JOBS_DATABASE_URL"))


def read() -> ProxySettings:
    """The proxy's settings. A wrong value of any part ends the process, before there are workers."""
    settings.read(PreprocessSettings)
    settings.read(PredictSettings)
    if _has_jobs():
        from jobs_service.settings import JobsSettings

        settings.read(JobsSettings)
    return settings.read(ProxySettings)


if __name__ == "__main__":
    lifecycle.run(serve, read, service="proxy")
