"""``python -m preprocess_service``: the process, from settings to shutdown."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from preprocess_service import settings
from preprocess_service.any_server import AnyServer
from preprocess_service.loading import preprocessor_store
from preprocess_service.service import PreprocessService
from splitserve.remote.inference import RemoteInference
from splitserve.server import lifecycle
from splitserve.server.admin import open_admin
from splitserve.server.grpc_face import GrpcFace
from splitserve.server.lifecycle import keep_refreshing
from splitserve.server.metrics import CacheMetrics, StageMetrics


async def serve(config: settings.PreprocessSettings) -> None:
    async with lifecycle.ServiceProcess(config, "preprocess") as process:
        preprocessors = preprocessor_store(config)
        executor = process.enter_context(ThreadPoolExecutor(config.n_threads, thread_name_prefix="preprocess"))
        predict = await process.enter_async_context(
            RemoteInference(
                config.predict_target, stage="predict", max_message_bytes=config.max_message_bytes, tls=config.next_tls
            )
        )
        server = AnyServer(predict, models=preprocessors.catalogue.models)
        service = PreprocessService(
            preprocessors,
            server,
            executor,
            max_message_bytes=config.max_message_bytes,
            allow_unreleased_pairs=config.allow_unreleased_pairs,
            predict_indexes=server.indexes,
        )
        budget = config.byte_budget()
        metrics = await open_admin(process, config, service.not_ready_reason)
        requests = metrics.add(
            "preprocess",
            StageMetrics(
                "preprocess",
                service,
                n_tried=preprocessors.n_tried,
                n_refused=preprocessors.n_refused,
                budget=budget,
                next_stage=predict,
                golden_errors=lambda: service.golden_errors,
            ),
        )
        metrics.add_part("cache", CacheMetrics(config.count_cached))
        face = await process.enter_async_context(
            GrpcFace(service, config.grpc_config, statistics=service.statistics, budget=budget, recorder=requests)
        )
        process.callback(preprocessors.close)
        process.push_async_callback(service.close)
        await process.serve(
            face,
            keep_refreshing(preprocessors, interval_s=config.refresh_interval_s),
            keep_refreshing(service, interval_s=config.refresh_interval_s, why_waiting=service.not_ready_reason),
        )


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(sys.argv[1:]), service="preprocess")
