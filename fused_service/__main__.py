"""``python -m fused_service``: the proxy's faces over preprocess and predict in one process.

Each stage reads the settings that it reads as a service; those of the connections between them have no effect. Jobs are part of
the process if ``JOBS_DIR`` or ``JOBS_DATABASE_URL`` is set.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager

from predict_service.loading import predictor_store
from predict_service.service import PredictService
from predict_service.settings import PredictSettings
from preprocess_service.loading import preprocessor_store
from preprocess_service.service import PreprocessService
from preprocess_service.settings import PreprocessSettings
from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.jobs.service import Jobs
from splitserve.server import lifecycle, settings
from splitserve.server.lifecycle import keep_refreshing


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
            predict,
            executor,
            max_message_bytes=preprocess_config.max_message_bytes,
            allow_unreleased_pairs=preprocess_config.allow_unreleased_pairs,
            predict_indexes=predict.indexes,
        )
        service = ProxyService(preprocess, limits=config.batch_limits, max_message_bytes=config.max_message_bytes)
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
        jobs = await process.enter_async_context(_jobs(service, config)) if _has_jobs() else None
        await process.serve(await process.enter_async_context(Faces(service, config, jobs)))


def _has_jobs() -> bool:
    return bool(os.environ.get("JOBS_DIR") or os.environ.get("JOBS_DATABASE_URL"))


def _jobs(service: ProxyService, config: ProxySettings) -> AbstractAsyncContextManager[Jobs]:
    """The jobs service in this process."""
    from jobs_service.building import build  # needs the extra jobs
    from jobs_service.settings import JobsSettings

    jobs_config = settings.read(JobsSettings)
    if config.workers > 1 and not jobs_config.database_url:
        print("PROXY_WORKERS: several processes cannot share a folder of jobs; set JOBS_DATABASE_URL", file=sys.stderr)
        raise SystemExit(2)
    return build(service, jobs_config)


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(ProxySettings), service="proxy")
