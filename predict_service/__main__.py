"""``python -m predict_service``: the process, from settings to shutdown."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from predict_service.loading import predictor_store
from predict_service.service import PredictService
from predict_service.settings import PredictSettings
from splitserve.server import kserve, lifecycle, settings
from splitserve.server.admin import open_admin
from splitserve.server.grpc_face import GrpcFace
from splitserve.server.metrics import CacheMetrics, StageMetrics


async def serve(config: PredictSettings) -> None:
    async with lifecycle.ServiceProcess(config, "predict") as process:
        predictors = predictor_store(config)
        executor = process.enter_context(ThreadPoolExecutor(config.n_threads, thread_name_prefix="predict"))
        service = PredictService(predictors, executor, limits=config.batch_limits, max_message_bytes=config.max_message_bytes)
        budget = config.byte_budget()
        metrics = await open_admin(process, config, service.not_ready_reason)
        requests = metrics.add(
            "predict",
            StageMetrics(
                "predict",
                service,
                batcher=service.batcher,
                n_tried=predictors.n_tried,
                n_refused=predictors.n_refused,
                budget=budget,
            ),
        )
        metrics.add_part("cache", CacheMetrics(config.count_cached))
        face = await process.enter_async_context(
            GrpcFace(
                service,
                config.grpc_config,
                statistics=service.statistics,
                budget=budget,
                recorder=requests,
                on_needed=service.hold,
            )
        )
        process.callback(predictors.close)
        await process.serve(face, lifecycle.keep_refreshing(predictors, interval_s=config.refresh_interval_s))


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(PredictSettings, **kserve.predictor(sys.argv[1:])), service="predict")
